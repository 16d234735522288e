"""The parts of a run that do not depend on the model: options, process group, files, logs, the Hub, benchmarks."""
