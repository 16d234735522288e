"""What every run needs and no model: options, process group, files, logs, the Hub, the end of a run."""
