"""Run in a process of its own with a sanitizer preloaded: the operators' cases, and planted kernels, in the emulator.

usage: sanitized.py address|thread|"" FOLDER cases|KERNEL...

A sanitizer ends the process that it accuses, so each runs in a fork of this one, which has imported everything and has
started no thread. What it says goes to FOLDER/NAME, and its exit code is the last line.
"""

import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]

from checks import clone_tree  # noqa: E402
from kernels.emulated import Emulator  # noqa: E402

from fastmerge import _cuda  # noqa: E402
from fastmerge.ops import expert_scatter, fw_lmo, fw_products, fw_step, permute, permute_merge  # noqa: E402


def cases(emulator: Emulator) -> None:
    """Every case of every operator once per dtype; results are compared elsewhere."""
    torch.set_num_threads(1)
    with _cuda.use_executor(emulator):
        for op in (permute, permute_merge, expert_scatter, fw_products, fw_lmo, fw_step):
            for case in op.cases:
                for dtype in case.dtypes:
                    args, kwargs = case.make(torch.Generator().manual_seed(0), dtype)
                    if op.why_not("cuda", *args, **kwargs) is None:
                        op(*clone_tree(args), backend="cuda", **kwargs)
        x = torch.randn(96, 130)
        permute(x, {0: torch.randperm(96), 1: torch.randperm(130)}, out=x, backend="cuda")
        fw_step([x], [x.clone()], 0.1, gradients=[x.clone()], backend="cuda")
    print(f"{len(emulator.launches)} launches")


def planted(emulator: Emulator, kernel: str) -> None:
    task = np.zeros((), np.dtype([("in", "u8"), ("out", "u8"), ("n", "i8")]))
    # One array per buffer, so that its end is the end of an allocation.
    source, result = np.arange(4096, dtype=np.float32), np.zeros(4096, dtype=np.float32)
    task["in"], task["out"], task["n"] = source.ctypes.data, result.ctypes.data, 4096
    tasks, first = torch.from_numpy(task.reshape(1).view(np.uint8)), torch.zeros(1, dtype=torch.int32)
    emulator.launch(kernel, 1, 1024, tasks, first, 1)
    if kernel.startswith("reverse"):
        assert result[:256].tolist() == source[255::-1].tolist(), "wrong result"


def apart(emulator: Emulator, what: str, folder: Path) -> None:
    if not (child := os.fork()):
        code = 1
        out = os.open(folder / what, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            if what == "cases":
                cases(emulator)
            else:
                planted(emulator, what)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    with (folder / what).open("a") as out:
        out.write(f"\n{os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    sanitizer, folder, *names = sys.argv[1:]
    emulators = {schedule: Emulator(sanitizer=sanitizer, schedule=schedule) for schedule in (0, 1)}
    for name in names:
        apart(emulators[name == "cases"], name, Path(folder))
