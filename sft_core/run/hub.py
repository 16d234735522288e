"""A run's traffic with the Hugging Face Hub: the check before it, uploads beside it, the final push.

All of it is done on the first rank, and in no collective. Only `check_hub` may stop a run; an upload that fails
for good later is a warning and an entry in what `close` returns. Transfers, their retries and the meaning of
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are huggingface_hub's.

Left out on purpose: pull requests, and resuming straight from the Hub (download
`last-checkpoint/` of hub_strategy `checkpoint` and give it to --resume_from_checkpoint).
"""

import functools
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import disable_progress_bars

from sft_core.run.config import TrainingConfig

logger = logging.getLogger(__name__)

# In a checkpoint, what is not the model; in output_dir, what is the run's and nobody else's.
TRAINING_STATE = ("state", "rank-*", "scheduler.pt", "progress.json", "manifest.json")
NOT_PUSHED = (
    "checkpoint-*",
    "*previous-*",
    ".*",
    "*/.*",
    "wandb/*",
    "wandb_id",
    "rollouts/*",
    "*.parquet",
    "latest",
    "completions.jsonl",
    "benchmarks/*",
    "runs/*",
    "merged/*",
)  # these hold prompts and answers, which may be private

# Weights that may be there from a push with another number of files: with them the folder would be two models.
STALE = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
_PROCESS = uuid.uuid4().hex[:8]


# --- before the run ----------------------------------------------------------------------------------------------


def check_hub(config: TrainingConfig) -> None:
    """Make sure, where the run will push, that it may: reach the Hub, log in, create the repository.

    Raises:
        ValueError: no token or one that may not write; no Hub; or `hub_model_revision` holds a model already (its
            README.md says so) and `overwrite_hub_revision` is not set.
    """
    if not (config.push_to_hub or config.push_to_hub_revision or config.callbacks):
        return
    repo, branch = model_repository(config), config.hub_model_revision
    if not config.push_to_hub_revision or config.overwrite_hub_revision:
        return
    if HfApi().file_exists(repo, "README.md", revision=branch):
        raise ValueError(
            f"branch {branch} of {repo} already holds a model (it has a README.md): choose another "
            "--hub_model_revision, or give --overwrite_hub_revision true."
        )


def model_repository(config: TrainingConfig) -> str:
    """`hub_model_id`, else the name of `output_dir`; under the user's own name where it has no namespace."""
    return repository(config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_private_repo, "model")


def repository(name: str, private: bool | None, kind: str) -> str:
    """The repository's whole name, `owner/name`; it is made where it is new.

    Raises:
        ValueError: no such name, no Hub, no token, or one that may not write there.
    """
    endpoint = HfApi().endpoint
    try:
        return _made(endpoint, get_token(), name, private, kind)
    except (HTTPError, OSError, HFValidationError) as error:
        raise ValueError(
            f"the Hub at {endpoint} does not take {kind} {name} ({_reason(error)}): check its name (--hub_model_id), "
            "the token (`hf auth login` or HF_TOKEN, with write access), the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "or do not push."
        ) from error


@functools.cache
def _made(endpoint: str, token: str | None, name: str, private: bool | None, kind: str) -> str:
    """Asked once, for the Hub limits how often one may."""
    return HfApi(endpoint, token).create_repo(name, repo_type=kind, private=private, exist_ok=True).repo_id


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def check_dataset_push(repo: str | None, private: bool) -> None:
    """Make sure, where a data set will be pushed, that it may be (`repository`)."""
    if repo:
        repository(repo, private or None, "dataset")


def push_dataset(file: Path, repo: str | None, private: bool, config_name: str = "default") -> None:
    """The file as the data set `repo` on the Hub; where that fails the file stays, and the same command tries again."""
    if not repo:
        return
    import pyarrow.parquet as pq  # not needed where no rows are read
    from datasets import Dataset

    if pq.read_metadata(file).num_rows == 0:
        return print(f"{file} has no rows and was not pushed.", file=sys.stderr)
    Dataset.from_parquet(str(file)).push_to_hub(repo, config_name=config_name, private=private or None)


# --- beside the run ----------------------------------------------------------------------------------------------


class Uploader:
    """Folders to the repository that `check_hub` has made, one after another, each in a thread: a crash, for which
    nobody waits, does not hang."""

    waits_s: tuple[float, ...] = (5.0, 30.0)  # before an upload that failed is tried again

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.failures: list[str] = []
        self.results: list[tuple[int, dict[str, float]]] = []  # step, {`benchmarks/<task>/<metric>`: value}
        self._last: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._last is not None and self._last.is_alive()

    def start(
        self,
        folder: Path,
        message: str,
        revision: str = "main",
        path_in_repo: str = "",
        ignore: Sequence[str] = (),
        remove: bool = False,
    ) -> None:
        """Upload `folder` as one commit to branch `revision`, made from the first commit where it is new.

        `ignore`: glob patterns relative to `folder`. `remove`: the folder afterwards, whether it succeeded or not.
        Weights of an earlier push that this one does not replace are removed from the branch.
        """
        before = self._last

        def upload() -> None:
            disable_progress_bars()  # they would run through the trainer's own
            api, repo = HfApi(), model_repository(self.config)
            if revision != "main":
                initial = api.list_repo_commits(repo)[-1].commit_id
                api.create_branch(repo, branch=revision, revision=initial, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                ignore_patterns=[*ignore],
                path_in_repo=path_in_repo,
                delete_patterns=["*"] if path_in_repo else [*STALE],
            )

        def job() -> None:
            if before is not None:
                before.join()
            for wait_s in (*self.waits_s, None):
                try:
                    upload()
                    break
                except Exception as error:  # whatever it is, the training goes on
                    what = f"{message}, to branch {revision}: {_reason(error)}"
                logger.warning("the Hub did not take %s%s", what, f"; trying again in {wait_s} s" if wait_s else "")
                if wait_s is None:
                    self.failures.append(what)
                else:
                    time.sleep(wait_s)
            if remove:
                shutil.rmtree(folder)

        self._last = threading.Thread(target=job, daemon=True)
        self._last.start()

    def close(self) -> list[str]:
        """Wait for all uploads; returns every one that failed, a sentence each."""
        if self._last is not None:
            self._last.join()
        return self.failures


class PushToHub(Uploader):
    """A run's callback (see `benchmarks.py`): each checkpoint's model to main, and with hub_strategy `checkpoint` or
    `all_checkpoints` the whole of it to the folder `last-checkpoint` or `checkpoint-<step>`."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        if self.busy and not self.config.hub_always_push:
            return
        folder = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(self.config.hub_strategy)
        message = f"Training in progress, step {step}"
        self.start(stage(checkpoint, TRAINING_STATE), message, remove=True)
        if folder:
            self.start(stage(checkpoint), f"{message}, {folder}", path_in_repo=folder, remove=True)


def stage(checkpoint: Path, ignore: Sequence[str] = ()) -> Path:
    """A copy of `checkpoint` beside it that outlives its removal by save_total_limit; whoever asks removes it.

    Files are hard links, which cost no space; where the file system has none, copies. Checkpoints' files are never
    written again. What a killed run left is removed: the folder is locked, so nobody else is using it.
    """
    for old in checkpoint.parent.glob(".upload-*"):
        if not old.name.startswith(f".upload-{_PROCESS}-"):
            shutil.rmtree(old)
    folder = checkpoint.parent / f".upload-{_PROCESS}-{uuid.uuid4().hex[:8]}"
    return shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*ignore), copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def push_final(config: TrainingConfig, folder: Path, message: str = "End of training") -> list[str]:
    """Push what training left in `folder` (output_dir), without checkpoints and the run's own files: to main with
    `push_to_hub`, to `hub_model_revision` with `push_to_hub_revision`. Waits; returns the failures."""
    branches = ["main"] * config.push_to_hub + [config.hub_model_revision] * config.push_to_hub_revision
    uploader = Uploader(config)
    for branch in dict.fromkeys(branches):
        uploader.start(folder, message, branch, ignore=NOT_PUSHED)
    return uploader.close()
