"""A run's traffic with the Hugging Face Hub: the check before it, uploads beside it, the final push.

All of it is done on the first rank, and in no collective. Only `check_hub` may stop a run; an upload that fails
for good later is a warning and an entry in what `wait` returns. Transfers and the meaning of HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE are huggingface_hub's.

Left out on purpose: pull requests, and resuming straight from the Hub (download
`last-checkpoint/` of hub_strategy `checkpoint` and give it to --resume_from_checkpoint).
"""

import functools
import logging
import os
import queue
import random
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from sft_core.run.config import TrainingConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

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
_own_dice = random.Random()  # never the global generator: that one belongs to the run, and its state to checkpoints


# --- before the run ----------------------------------------------------------------------------------------------


def check_hub(config: TrainingConfig) -> None:
    """Make sure, where the run will push, that it may: reach the Hub, log in, create the repository.

    Raises:
        ValueError: no token or one that may not write; no Hub; or `hub_model_revision` holds a model already (its
            README.md says so) and `overwrite_hub_revision` is not set.
    """
    if not (config.push_to_hub or config.push_to_hub_revision or config.callbacks):
        return
    api = HfApi()

    def ask() -> bool:
        _user(api.endpoint, get_token())  # without a token the Hub would say 401, which reads like a wrong one
        repo = resolve_repo_id(config)
        api.create_repo(repo, private=config.hub_private_repo, exist_ok=True)
        return config.push_to_hub_revision and api.file_exists(repo, "README.md", revision=config.hub_model_revision)

    with refusals_said(api, "another --hub_model_id"):
        taken = _retrying(ask, tries=3, first_wait_s=1.0)
    if taken and not config.overwrite_hub_revision:
        raise ValueError(
            f"branch {config.hub_model_revision} of {resolve_repo_id(config)} already holds a model (it has a "
            "README.md): choose another --hub_model_revision, or give --overwrite_hub_revision true."
        )


@contextmanager
def refusals_said(api: HfApi, elsewhere: str) -> Iterator[None]:
    """Turn what the Hub or the network refuses inside into a ValueError with the remedy; `elsewhere`: where one may
    push instead."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError("pushing to the Hub needs a token: log in with `hf auth login`, or set HF_TOKEN.") from None
    except OfflineModeIsEnabled:
        raise ValueError("pushing to the Hub: HF_HUB_OFFLINE is set; unset it, or do not push.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedies = {
            401: "it refuses the token: log in anew with `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write there: take one with write access, or {elsewhere}",
        }
        remedy = remedies.get(status, "try again later, or do not push")
        raise ValueError(f"the Hub at {api.endpoint} answers {status} ({_reason(error)}): {remedy}.") from error
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"the Hub at {api.endpoint} cannot be reached ({_reason(error)}): check the network and HF_ENDPOINT, or do "
            "not push."
        ) from error


def check_dataset_push(repo: str | None, private: bool) -> None:
    """Make sure, where a data set will be pushed, that it may be.

    Raises:
        ValueError: no Hub, no token, or one that may not write there.
    """
    if repo:
        api = HfApi()
        with refusals_said(api, "another name"):
            _user(api.endpoint, get_token())  # without a token the Hub would say 401, which reads like a wrong one
            api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)


def push_dataset(file: Path, repo: str | None, private: bool, config_name: str = "default") -> None:
    """The file as the data set `repo` on the Hub; a failure ends the process with 1, and the file stays."""
    if not repo:
        return
    import pyarrow.parquet as pq  # not needed where no rows are read
    from datasets import Dataset

    if pq.read_metadata(file).num_rows == 0:
        return print(f"{file} has no rows and was not pushed.", file=sys.stderr)
    try:
        Dataset.from_parquet(str(file)).push_to_hub(repo, config_name=config_name, private=private or None)
    except Exception as error:  # whatever it is, the work is done and the command may be given again
        cause = " ".join(str(error).split())[:300]
        print(f"error: the Hub did not take {file}: {cause}. The same command tries again.", file=sys.stderr)
        raise SystemExit(1) from None


def resolve_repo_id(config: TrainingConfig) -> str:
    """`hub_model_id`, else the name of `output_dir`; under the user's own name where it has no namespace."""
    repo = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} cannot be a repository's name: give --hub_model_id ({_reason(error)}).") from error
    return repo if "/" in repo else f"{_user(HfApi().endpoint, get_token())}/{repo}"


@functools.cache
def _user(endpoint: str, token: str | None) -> str:
    """Whose token it is: asked once, for the Hub limits how often one may."""
    return HfApi(endpoint, token).whoami()["name"]


def _retrying(work: Callable[[], T], tries: int, first_wait_s: float) -> T:
    """Again on what may pass, after waits that double and jitter; raises the last error, or one that will not pass."""
    for attempt in range(1, tries + 1):
        try:
            return work()
        except Exception as error:
            if attempt == tries or not _may_pass(error):
                raise
            wait = first_wait_s * 2 ** (attempt - 1) * _own_dice.uniform(0.5, 1.5)
            logger.warning("the Hub: %s; try %d of %d in %.1f s", _reason(error), attempt + 1, tries, wait)
            time.sleep(wait)
    raise AssertionError("not reached")


def _may_pass(error: BaseException | None) -> bool:
    """Whether trying again makes sense: rate limits, conflicts, server errors, connections and what is not known."""
    first = error
    while error is not None:  # the client wraps an upload's error in another
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code in (408, 409, 412, 429) or error.response.status_code >= 500
        error = error.__cause__
    return not isinstance(first, ValueError | FileNotFoundError | LocalTokenNotFoundError | OfflineModeIsEnabled)


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


# --- beside the run ----------------------------------------------------------------------------------------------


class InOrder:
    """Jobs done one after another in a thread. What nobody waits for ends with the process: a crash does not hang."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def add(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:  # said, and the jobs behind it are done all the same
                logger.exception("a job beside the training failed")
            finally:
                self._jobs.task_done()

    @property
    def busy(self) -> bool:
        return self._jobs.unfinished_tasks > 0

    def wait(self) -> None:
        self._jobs.join()


class Uploader(InOrder):
    """Folders to the repository that `check_hub` has made."""

    tries, first_wait_s = 5, 4.0

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.failures: list[str] = []

    def start(
        self,
        folder: Path,
        *,
        revision: str = "main",
        message: str,
        path_in_repo: str = "",
        ignore: Sequence[str] = (),
        then: Callable[[], None] | None = None,
    ) -> None:
        """Queue an upload of `folder` as one commit to branch `revision`, made from the first commit where it is new.

        `ignore`: glob patterns relative to `folder`. `then` is called afterwards in the uploading thread, whether it
        succeeded or not. Weights of an earlier push that this one does not replace are removed.
        """

        def upload() -> None:
            disable_progress_bars()  # they would run through the trainer's own
            api, repo = HfApi(), resolve_repo_id(self.config)
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
            try:
                _retrying(upload, self.tries, self.first_wait_s)
            except Exception as error:  # whatever it is, the training goes on
                place = self.config.hub_model_id or Path(self.config.output_dir).resolve().name
                self.failures.append(f"{message}, to branch {revision} of {place}: {_reason(error)}")
                logger.warning("the Hub did not take %s", self.failures[-1])
            finally:
                if then is not None:
                    then()

        self.add(job)

    def close(self) -> list[str]:
        """Wait for all uploads; returns every one that failed, a sentence each."""
        self.wait()
        return self.failures


class PushToHub(Uploader):
    """A run's callback (see `benchmarks.py`): each checkpoint's model to main, and with hub_strategy `checkpoint` or
    `all_checkpoints` the whole of it to the folder `last-checkpoint` or `checkpoint-<step>`."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        if self.busy and not self.config.hub_always_push:
            return
        folder = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(self.config.hub_strategy)
        message = f"Training in progress, step {step}"
        ignore = [name for pattern in TRAINING_STATE for name in (pattern, f"{pattern}/*")]
        staged = stage(checkpoint, () if folder else TRAINING_STATE)
        remove = functools.partial(shutil.rmtree, staged)
        self.start(staged, message=message, ignore=ignore, then=None if folder else remove)
        if folder:
            self.start(staged, message=f"{message}, {folder}", path_in_repo=folder, then=remove)

    def finished(self) -> list[tuple[int, dict[str, float]]]:
        return []


@functools.cache
def _this_process() -> str:
    return uuid.uuid4().hex[:8]


def stage(checkpoint: Path, ignore: Sequence[str] = ()) -> Path:
    """A copy of `checkpoint` beside it that outlives its removal by save_total_limit; whoever asks removes it.

    Files are hard links, which cost no space; where the file system has none, copies. Checkpoints' files are never
    written again. What a killed run left is removed: the folder is locked, so nobody else is using it.
    """
    for old in checkpoint.parent.glob(".upload-*"):
        if not old.name.startswith(f".upload-{_this_process()}-"):
            shutil.rmtree(old)
    folder = checkpoint.parent / f".upload-{_this_process()}-{uuid.uuid4().hex[:8]}"
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
        uploader.start(folder, revision=branch, message=message, ignore=NOT_PUSHED)
    return uploader.close()
