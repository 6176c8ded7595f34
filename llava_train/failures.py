"""What an exception means to the user: `explain` knows the failures of libraries and machines. Needs no torch.

It goes by the types of an exception and of those that it came from; by texts only where a library has no type for it.
A class is looked up in the modules that are loaded: what was not imported has raised nothing.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_train.errors import OtherRankFailed

WIDEST = 240
"""Characters of a line, where names and paths are of ordinary length."""
_WIDEST_OF_LIBRARIES = 400
_MOST_LINKS = 16
_HUB = "https://huggingface.co"
_HUB_ANSWER = "huggingface_hub.errors.HfHubHTTPError"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Context:
    """What is known of the moment of a failure."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0
    doing: str = ""
    """What was being done, `forward and backward of step 3`; empty where nobody knows."""
    run_dir: Path | None = None
    """The folder of the run; None for commands that have none."""
    subject: str = ""
    """What was to be loaded: a hub id or a folder."""
    is_run: bool = False
    """Whether stages are trained, so that the same command goes on."""

    @property
    def during(self) -> str:
        return f" in {self.doing}" if self.doing else ""


@dataclass(frozen=True)
class Explanation:
    """A failure in words."""

    what: str
    mend: tuple[str, ...]
    """What to do, a line each."""
    subject: str = ""
    by_another_rank: bool = False
    """It only follows from the failure of another rank."""

    def __str__(self) -> str:
        return "\n".join([self.what, *self.mend])


Explain = Callable[[BaseException, Context], Explanation | None]


def explain(error: BaseException, context: Context | None = None) -> Explanation | None:
    """The failure that an exception, or one of those that it came from, tells of; None for one that is not known."""
    context = context or Context()
    for link in chain(error):
        for known in _KNOWN:
            if found := known(link, context):
                return found
    return None


def cannot_load(key: str, name: object, error: BaseException) -> str:
    """Why what a key of a stage file names cannot be loaded, in words that say what to do."""
    return f"{key}: cannot load {name}: {reason(error, name)}"


def reason(error: BaseException, name: object = "") -> str:
    """A failure in words: explained, or else the first lines of what its library says."""
    return str(explain(error, Context(subject=str(name))) or first_lines(error))


def file_trouble(error: OSError) -> str:
    """What the file system refused, and what to do."""
    found = explain(error) or explain_file(error, Context())
    subject = f"{found.subject}: " if found and found.subject else ""
    return f"{subject}{found or first_lines(error)}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those that it came from."""
    link: BaseException | None = error
    for _ in range(_MOST_LINKS):
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def first_lines(error: BaseException, n_lines: int = 2) -> str:
    """The beginning of an exception's message; of one that a loader's worker sent, the end, where it stands there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and " in DataLoader worker process " in lines[0]:
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return "\n".join(shortened(line, _WIDEST_OF_LIBRARIES) for line in lines[:n_lines]) or type(error).__name__


def shortened(line: str, most: int = WIDEST - 40) -> str:
    return line if len(line) <= most else f"{line[: most - 3]}..."


def is_a(error: BaseException, name: str) -> bool:
    """Whether an exception is of a class, `module.Class`, whose module need not be loaded."""
    module, _, class_name = name.rpartition(".")
    found = getattr(sys.modules.get(module), class_name, None)
    return isinstance(found, type) and isinstance(error, found)


def _of_other_rank(error: BaseException, context: Context) -> Explanation | None:
    if isinstance(error, OtherRankFailed):
        return Explanation(str(error), (), by_another_rank=True)
    lost = (isinstance(error, RuntimeError) and "gloo/transport/" in str(error)) or is_a(
        error, "torch.distributed.DistBackendError"
    )
    if not lost or context.n_ranks == 1:
        return None
    what = "the connection to another rank broke, which failed or was ended: see what it says"
    return Explanation(what, (), by_another_rank=True)


def _gated(error: BaseException, context: Context) -> Explanation | None:
    of_datasets = is_a(error, "datasets.exceptions.DatasetNotFoundError") and "gated" in str(error)
    if not (of_datasets or is_a(error, "huggingface_hub.errors.GatedRepoError")):
        return None
    name = context.subject or repository_of(error)
    page = f"{_HUB}/{'datasets/' * of_datasets}{name}" if name else "its page on the hub"
    return Explanation(
        "it is gated: the hub gives it only to accounts that have accepted its terms",
        (
            f"Accept them at {page}, run `hf auth login` with that account (or set HF_TOKEN), and start again;",
            "or name a folder with a copy of it instead.",
        ),
        name,
    )


def _not_on_hub(error: BaseException, context: Context) -> Explanation | None:
    names = ("huggingface_hub.errors.RepositoryNotFoundError", "datasets.exceptions.DatasetNotFoundError")
    if not any(is_a(error, name) for name in names):
        return None
    return Explanation(
        "there is no such folder here, and no such repository on the hub that this account may see",
        (
            f"Check the spelling. If a folder is meant, its path counts from {Path.cwd()}.",
            "A private repository needs `hf auth login` with an account that may read it (or HF_TOKEN).",
        ),
        context.subject or repository_of(error),
    )


def _no_hub(error: BaseException, context: Context) -> Explanation | None:
    name = context.subject or repository_of(error)
    copied = f"Or `hf download {name or 'NAME'} --local-dir FOLDER` where there is a network, and name that folder."
    is_local = is_a(error, "huggingface_hub.errors.LocalEntryNotFoundError")
    answers = [link for link in (chain(error) if is_local else (error,)) if is_a(link, _HUB_ANSWER)]
    if answers and (code := getattr(getattr(answers[0], "response", None), "status_code", None)):
        login = "Check which account `hf auth whoami` shows, and what its token may do; `hf auth login` changes it."
        mend = login if code in (401, 403) else "Start again later; https://status.huggingface.co tells of outages."
        return Explanation(f"the hub refuses it, by code {code}", (mend, copied), name)
    is_offline = is_a(error, "huggingface_hub.errors.OfflineModeIsEnabled") or "OfflineModeIsEnabled" in str(error)
    if is_offline or (is_local and getattr(sys.modules.get("huggingface_hub.constants"), "HF_HUB_OFFLINE", False)):
        return Explanation(
            "it is no folder here and not in the hub's cache, and HF_HUB_OFFLINE forbids to download it",
            ("Unset HF_HUB_OFFLINE where there is a network, or give the folder of a copy.", copied),
            name,
        )
    by_datasets = isinstance(error, ConnectionError) and "on the Hub" in str(error)
    if not (is_local or by_datasets or _is_of_http(error)):
        return None
    *_, last = chain(error)
    why = shortened(first_lines(last, 1), 80) if _is_of_http(last) else type(last).__name__
    return Explanation(
        f"the hub cannot be reached ({why}), and it is no folder here",
        ("Check the network and its proxy (HTTPS_PROXY, HF_ENDPOINT), and start again.", copied),
        name,
    )


def _is_of_http(error: BaseException) -> bool:
    """Whether the HTTP library of the hub failed to reach a server: it is another one in each version."""
    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    unreached = ("TransportError", "NetworkError", "ConnectionError", "Timeout")
    classes = [of for of in type(error).__mro__ if of.__module__.split(".")[0] in libraries]
    return any(of.__name__ in unreached for of in classes)


def repository_of(error: BaseException) -> str:
    """The repository that an error of the hub is about, by the address in it."""
    found = re.search(r"https?://[^/\s]+/(?:api/)?(?:models/|datasets/)?([\w.-]+/[\w.-]+)", str(error))
    return found[1] if found else ""


def _device_memory(error: BaseException, context: Context) -> Explanation | None:
    said = str(error)
    by_library = isinstance(error, RuntimeError) and ("CUDA error: out of memory" in said or "_ALLOC_FAILED" in said)
    if not (by_library or is_a(error, "torch.OutOfMemoryError")):
        return None
    of_run = (
        "Lower batch.max_tokens, or set engine.activation_checkpointing: full; neither changes a result.",
        "`llava-train plan --config STAGE` tells what takes the memory, and what makes it fit.",
    )
    of_command = (
        "See by `nvidia-smi` who else uses the GPU; take --dtype bf16 or --quantize 4bit where the command has it,",
        "fewer --max-new-tokens or a smaller --batch-size; or --device cpu.",
    )
    return Explanation(
        f"the memory of the GPU ran out{context.during}",
        (f"PyTorch says: {shortened(said.split('. ')[0])}", *(of_run if context.is_run else of_command)),
    )


def _host_memory(error: BaseException, context: Context) -> Explanation | None:
    by_torch = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (by_torch or by_system or isinstance(error, MemoryError)):
        return None
    of_run = (
        "Lower loader.workers; engine.offload_optimizer and engine.offload_parameters take host memory, too.",
        "In a job, ask for more: llava-train slurm --sbatch-arg=--mem=200G.",
    )
    of_command = ("Close other programs, or lower --workers or --batch-size where the command has it.",)
    said = first_lines(error, 1).rpartition("DefaultCPUAllocator: ")[2]
    return Explanation(
        f"the memory of this machine ran out{context.during}",
        (f"The system says: {shortened(said)}", *(of_run if context.is_run else of_command)),
    )


def _worker(error: BaseException, context: Context) -> Explanation | None:
    found = re.match(r"DataLoader worker \(pid (\d+)\) is killed by signal: (\w+(?: \w+)?)", str(error))
    if found is None or not isinstance(error, RuntimeError):
        return None
    process, name = found[1], found[2]
    mend: tuple[str, ...]
    if name.startswith("Bus"):
        mend = (
            "It found no room in shared memory (/dev/shm). A container gets more by --shm-size=16g or --ipc=host.",
            "Or lower loader.workers.",
        )
    elif name in ("Killed", signal.Signals.SIGKILL.name):
        mend = (
            "The system does so when a machine's memory, or a job's, runs out (`dmesg -T | grep -i oom` shows it).",
            "Lower loader.workers, or ask for more memory: llava-train slurm --sbatch-arg=--mem=200G.",
        )
    else:
        mend = ("--set loader.workers=0 reads the data in this process, whose error then tells more.",)
    return Explanation(f"a worker of the loader (process {process}) was ended by a signal: {name}", mend)


_CUDA: Mapping[str, tuple[str, str]] = {
    "not compiled with CUDA": (
        "this PyTorch was built without it",
        "Install a PyTorch with CUDA, as https://pytorch.org/get-started/locally says",
    ),
    "driver on your system is too old|driver version is insufficient": (
        "the NVIDIA driver is too old for this PyTorch",
        "Update the driver, or install a PyTorch of an older CUDA: https://pytorch.org/get-started/previous-versions",
    ),
    "Found no NVIDIA driver": ("there is no NVIDIA driver", "Install it, and see that `nvidia-smi` lists the GPUs"),
    "No CUDA GPUs are available|no CUDA-capable device": (
        "no GPU is visible",
        "See that `nvidia-smi` lists one, and that CUDA_VISIBLE_DEVICES or the job's request does not hide it",
    ),
    "invalid device ordinal": (
        "there is no GPU of that number",
        "Start no more processes than there are GPUs, or name another --device",
    ),
    "no kernel image is available": (
        "this PyTorch has no code for this GPU",
        "Install a PyTorch that knows it: https://pytorch.org/get-started/locally",
    ),
    "driver initialization failed|CUDA unknown error": (
        "its driver does not start",
        "See what `nvidia-smi` says; after an update of the driver, restart the machine",
    ),
}


def _cuda(error: BaseException, context: Context) -> Explanation | None:
    if isinstance(error, RuntimeError | AssertionError):
        for pattern, (what, mend) in _CUDA.items():
            if re.search(pattern, str(error)):
                return no_cuda(what, mend)
    return None


def no_cuda(what: str, mend: str) -> Explanation:
    return Explanation(f"CUDA cannot be used: {what}", (f"{mend}.", "`llava-train doctor` shows what PyTorch sees."))


def _port(error: BaseException, context: Context) -> Explanation | None:
    by_torch = is_a(error, "torch.distributed.DistNetworkError") and "EADDRINUSE" in str(error)
    if not (by_torch or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE)):
        return None
    found = re.search(r"port: (\d+)", str(error))
    port = found[1] if found else os.environ.get("MASTER_PORT", "")
    return Explanation(
        f"the port {port} is in use".replace("  ", " ") + ", where the processes of this run would meet",
        (
            "Another run of this machine has it, or what is left of one: `ss -ltnp` shows which process.",
            "Give this run another: torchrun --standalone ..., or --master_port 29555 after torchrun or deepspeed.",
        ),
    )


def _rendezvous(error: BaseException, context: Context) -> Explanation | None:
    said = str(error)
    absent = re.search(r"after (\d+) seconds waiting for clients\. (\d+)/(\d+) clients joined", said)
    deaf = re.search(r"timed out after (\d+)ms while trying to connect to \((.+), (\d+)\)", said)
    if absent and is_a(error, "torch.distributed.DistStoreError"):
        what = f"{absent[2]} of the run's {absent[3]} processes came, and no more in {absent[1]} s"
    elif deaf and is_a(error, "torch.distributed.DistNetworkError"):
        what = f"rank 0 of the run did not answer at {deaf[2]}:{deaf[3]} in {int(deaf[1]) // 1000} s"
    elif is_a(error, "torch.distributed.elastic.rendezvous.api.RendezvousError"):
        what = f"the agents of torchrun did not meet ({type(error).__name__})"
    else:
        return None
    return Explanation(
        what,
        (
            "Start the same command on every node, with the same --nnodes, --nproc_per_node and address of the first,",
            "and look there for a process that ended early. Nothing may block the nodes' way to that address: set",
            "NCCL_SOCKET_IFNAME to the interface that they share, and MASTER_ADDR to the first one's address on it.",
        ),
    )


def _no_room(error: BaseException, context: Context) -> Explanation | None:
    code, place = None, ""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        code, place = error.errno, str(error.filename or "")
    elif found := re.search(r"\(os error (\d+)\)", str(error)):  # of libraries in Rust: safetensors, tokenizers
        code = int(found[1]) if int(found[1]) in _NO_ROOM else None
    if code is None:
        return None
    causes = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of this account is used up"}
    cause = causes.get(code, "a file is larger than the file system, or `ulimit -f`, allows")
    where = context.run_dir or place or "."
    mend = [f"Make room: `df -h {where}` shows how much there is."]
    if context.is_run:
        mend.append("A lower checkpoint.keep takes less; an `output:` on another disk takes the whole run there.")
    mend.append("HF_HOME moves what is downloaded from the hub to another disk, TMPDIR what is temporary.")
    return Explanation(f"{cause}{context.during}", tuple(mend), place)


def _misfit(error: BaseException, context: Context) -> Explanation | None:
    said = str(error)
    of_torch = "loading state_dict for" in said or "size mismatch for" in said or "ignore_mismatched_sizes" in said
    if not (of_torch and isinstance(error, RuntimeError)):
        return None
    return Explanation(
        f"its weights do not fit the model{context.during}",
        (
            first_misfit(error),
            "Name the parts and settings that the weights were made with, or others' weights;",
            "a run whose parts have changed begins anew under another name.",
        ),
        context.subject,
    )


def first_misfit(error: BaseException) -> str:
    """The first tensor that does not fit, of all that torch lists; or what else an error begins with."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return shortened(next((line for line in lines if "size mismatch" in line or "in state_dict: " in line), lines[0]))


def _damaged(error: BaseException, context: Context) -> Explanation | None:
    if not is_a(error, "safetensors.SafetensorError"):
        return None
    return Explanation(
        f"a file of weights is damaged or incomplete ({shortened(str(error), 120)})",
        ("Copy it, or download it, again: `hf download NAME --force-download` replaces what the cache holds.",),
        context.subject,
    )


def _file(error: BaseException, context: Context) -> Explanation | None:
    if not (isinstance(error, OSError) and error.errno and error.filename):
        return None
    mends = {
        errno.EMFILE: "This process may open no more files: `ulimit -n 65536` lets it.",
        errno.EACCES: "Give this account the right to read or write it, or name another place.",
        errno.EROFS: "It can only be read: name another place.",
    }
    mend = mends.get(error.errno, "See that it is there, and that every machine of the run sees it.")
    return Explanation(f"{error.strerror}{context.during}", (mend,), os.fsdecode(str(error.filename)))


_KNOWN: tuple[Explain, ...] = (
    _of_other_rank,
    _gated,
    _not_on_hub,
    _no_hub,
    _device_memory,
    _host_memory,
    _worker,
    _cuda,
    _port,
    _rendezvous,
    _no_room,
    _misfit,
    _damaged,
)


def explain_file(error: BaseException, context: Context) -> Explanation | None:
    """An error of the file system that names its file, whatever it is."""
    return next((found for link in chain(error) if (found := _file(link, context))), None)


def of_command(command: str = "") -> Context:
    """A command, by what a launcher says of this process."""
    return _of_environment(os.environ, command or " ".join(["llava-train", *sys.argv[1:2]]), is_run=False)


def of_run() -> Context:
    """A process of a run, by what a launcher says of it."""
    return _of_environment(os.environ, "its start", is_run=True)


def _of_environment(environment: Mapping[str, str], doing: str, is_run: bool) -> Context:
    def number(default: int, *names: str) -> int:
        found = [environment[name] for name in names if environment.get(name, "").isdecimal()]
        return int(found[0]) if found else default

    return Context(
        number(0, "RANK", "SLURM_PROCID"),
        number(1, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        number(0, "LOCAL_RANK", "SLURM_LOCALID"),
        doing,
        is_run=is_run,
    )
