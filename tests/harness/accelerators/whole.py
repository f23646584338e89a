"""Where the weights are after a fit: on rank 0, in a checkpoint; and what works without them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import harness
from harness.callbacks import ModelCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.checkpoint.full_weights.export import INDEX, export_weights
from harness.checkpoint.ranks.merge import MergedWeights
from harness.reshard.meta_parameters import has_meta_parameters
from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.fits import data
from tests.harness.accelerators.worker import OWN_MAPPINGS
from tests.harness.checkpoint.ranks.threads import counting_opens
from tests.harness.exact import same_bits

ROWS = 24


class Wide(nn.Module):
    """More than stays on every rank: 17 MiB, with tied weights and a buffer of its own."""

    def __init__(self, width: int = 4300) -> None:
        super().__init__()
        self.first = nn.Linear(6, 1024)
        self.norm = nn.BatchNorm1d(1024)
        self.wide = nn.Linear(1024, width)
        self.last = nn.Linear(width, 4)
        self.again = self.last
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([1.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).tanh() * self.scale
        found: Tensor = self.again(self.wide(hidden).tanh())
        return found


def two_rates(model: nn.Module, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Two named optimizers over one net."""
    first, *rest = model.children()
    others = {id(p): p for module in rest for p in module.parameters()}
    return {
        "first": torch.optim.SGD(first.parameters(), lr=lr),
        "rest": torch.optim.SGD(others.values(), lr=lr),
    }


def learner(width: int = 4300, optimizer: Any = torch.optim.SGD) -> harness.Learner:
    made = harness.setup(Wide, loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    return made.set_hparams(width=width).set_opt_hparams(lr=0.01)


def fitted(
    lab: Lab, *callbacks: harness.Callback, made: Any = None, **options: Any
) -> harness.Fitted:
    """Two short epochs; `made` is the learner."""
    given: dict[str, Any] = {
        "seed": 4,
        "tracker": False,
        "verbose": False,
        "accelerator": lab.make(),
        "dataloader_options": {"batch_size": ROWS // lab.world},
    }
    made = made or learner()
    return made.fit(
        data(48), 2, data(24, seed=1), callbacks=callbacks, **(given | options)
    )


def same_weights(found: nn.Module, wanted: nn.Module) -> bool:
    pairs = zip(found.state_dict().items(), wanted.state_dict().items(), strict=True)
    return all(a == b and same_bits(one, two) for (a, one), (b, two) in pairs)


def check_passes(lab: Lab, found: harness.Fitted, wanted: nn.Module) -> None:
    was_meta = has_meta_parameters(found.placement.module)
    x, y = data(31, seed=2)
    with torch.no_grad():
        outputs = wanted(x)
    torch.testing.assert_close(found.predict(x, accelerator=lab.make()), outputs)
    said = found.evaluate((x, y), accelerator=lab.make(), verbose=False)
    loss = said.records["metrics"]["valid"][0]["loss"]
    loss = loss["rest"] if isinstance(loss, dict) else loss
    assert abs(loss - float(nn.functional.cross_entropy(outputs, y))) < 1e-5
    assert has_meta_parameters(found.placement.module) == was_meta


def check_uses(lab: Lab, found: harness.Fitted, wanted: nn.Module) -> None:
    """What works on every rank, wherever the weights are; they are there again afterwards."""
    was_meta = has_meta_parameters(found.placement.module)
    check_passes(lab, found, wanted)
    folder = lab.folder / f"saved-{lab.stage}-{found.placement.holder}"
    found.save(folder)
    assert same_weights(harness.load(folder, Wide).model, wanted)
    found.save_weights(folder.with_suffix(".safetensors"))
    count = sum(param.numel() for param in wanted.parameters())
    assert f"{count:,} parameters" in str(found)
    assert found.summary().num_params == count
    more = found.fit(
        data(48), 1, accelerator=lab.make(), tracker=False, verbose=False, seed=1
    )
    check_start(lab, found, found, wanted)
    assert has_meta_parameters(found.placement.module) == was_meta
    if lab.rank == 0:
        assert not same_weights(more.model, wanted)


def check_start(lab: Lab, found: harness.Fitted, start: Any, wanted: nn.Module) -> None:
    """A fit of another learner that trains nothing ends with the weights it starts from."""
    made = learner(**found.hparams).set_opt_hparams(lr=0.0)  # type: ignore[arg-type]
    begun = fitted(lab, made=made, start=start, strict=True)
    if lab.rank == 0:
        for name, value in begun.model.named_parameters():
            assert same_bits(value.detach(), wanted.get_parameter(name).detach())


def case_weights_stay_on_rank_0(lab: Lab) -> None:
    found = fitted(lab)
    if lab.rank:
        with pytest.raises(
            RuntimeError, match=r"got them in rank 0, not on rank 1.* 17"
        ):
            _ = found.model
        assert has_meta_parameters(found.placement.module)
    weights = found.model.state_dict() if lab.rank == 0 else {}
    wanted = Wide()
    wanted.load_state_dict(lab.make().broadcast(weights))
    check_uses(lab, found, wanted.eval())
    assert found.gather(accelerator=lab.make()) is found.model
    assert same_weights(found.model, wanted)
    check_passes(lab, found, wanted)


def case_small_models_stay_on_every_rank(lab: Lab) -> None:
    found = fitted(lab, made=learner(width=8))
    weights = lab.make().gather_objects(found.model.state_dict())
    for own in weights:
        assert all(same_bits(own[name], value) for name, value in weights[0].items())


def case_weights_that_are_not_gathered_are_in_a_checkpoint(lab: Lab) -> None:
    made = learner(width=8, optimizer=two_rates)
    whole = fitted(lab, made=made)
    saves = ModelCheckpoint(lab.folder / f"all-{lab.stage}")
    found = fitted(lab, saves, made=made, gather=False)
    assert found.checkpoint is not None
    assert found.checkpoint.parent == saves.path / "final"  # type: ignore[operator]
    assert same_metrics(found, whole)
    with pytest.raises(RuntimeError, match=r"got them in the checkpoint '.*gather\(\)"):
        _ = found.model
    check_uses_of_checkpoint(lab, found, whole.model)
    assert same_weights(found.gather(), whole.model)


def same_metrics(found: harness.Fitted, wanted: harness.Fitted) -> bool:
    return bool(found.records["metrics"] == wanted.records["metrics"])


def check_uses_of_checkpoint(
    lab: Lab, found: harness.Fitted, wanted: nn.Module
) -> None:
    """As ``check_uses``, for the small model, and what reads the checkpoint itself."""
    assert found.checkpoint is not None
    merged = MergedWeights(found.checkpoint)
    for name, value in wanted.named_parameters():
        assert same_bits(merged[name], value.detach())
    assert merged.left_out == {"scale"}
    check_passes(lab, found, wanted)
    folder = lab.folder / f"saved-{lab.stage}"
    found.save(folder)
    assert same_weights(harness.load(folder, Wide).model, wanted)
    more = found.fit(data(48), 1, accelerator=lab.make(), tracker=False, verbose=False)
    assert not same_weights(more.model, wanted)
    check_start(lab, found, found, wanted)
    with counting_opens() as opened:
        check_start(lab, found, found.checkpoint, wanted)
    if lab.rank:  # it compared its own part, and was sent the weights
        of_parts = {name for name in opened if name.startswith("rank-")}
        assert of_parts == {"rank-1.json", "rank-1.safetensors"}, opened
    else:
        to = lab.folder / f"shards-{lab.stage}"
        # The folder has checkpoints of the fit too: the final one is the newest.
        assert export_weights(found.checkpoint.parent.parent, to, 1) == found.checkpoint
        check_exported(to, wanted)
        (regular,) = list_checkpoints(found.checkpoint.parent.parent)
        export_weights(regular, to.with_suffix(".safetensors"))
        check_exported(to.with_suffix(".safetensors"), wanted)


def check_exported(path: Path, wanted: nn.Module) -> None:
    """Files of a folder or one file, with the weights of a state dict; tied ones once."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    state = wanted.state_dict()
    assert found.keys() == {name for name in state if not name.startswith("again")}
    assert all(same_bits(value, state[name]) for name, value in found.items())
    if path.is_dir():
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        assert weight_map.keys() == found.keys()
        assert len(files) == len(found)  # a size of one byte: a file for each


class Measure(harness.Callback):
    """Notes the memory at the end of training, and begins to count its peak anew."""

    weight = math.inf
    bytes_before = 0

    def __init__(self, saves: ModelCheckpoint) -> None:
        self.saves = saves

    def on_fit_end(self) -> None:
        if self.saves.writer is not None:  # it allocates memory beside a fit
            self.saves.writer.wait()
        self.bytes_before = begin_peak()


def begin_peak() -> int:
    """Count the peak anew from now on; returns the bytes of memory at this moment.

    Code that is read from libraries meanwhile is left out: a process that was forked from
    one that has it counts it when it first touches it.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return read_memory("RssAnon")


def read_peak(bytes_before: int) -> int:
    """Bytes of memory at the highest since ``begin_peak``, above what it returned."""
    files = read_memory("RssFile") + read_memory("RssShmem")
    return read_memory("VmHWM") - files - bytes_before


def read_memory(name: str) -> int:
    """Bytes of a line in the status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


class Deep(nn.Sequential):
    """Twelve matrices of 4 MiB."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(1024, 1024) for _ in range(12)))


EXPORT = """
import sys
from pathlib import Path
from harness.checkpoint.full_weights.export import export_weights
from tests.harness.accelerators.whole import begin_peak, read_peak
before = begin_peak()
export_weights(Path(sys.argv[1]), Path(sys.argv[2]))
print(read_peak(before))
"""


def case_memory_at_the_end_of_a_fit_on_ranks(lab: Lab) -> None:
    if lab.stage != 3:
        return
    made = harness.setup(Deep, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    layer = 4 * 1024 * 1024
    for gather in (True, False):
        saves = ModelCheckpoint(lab.folder / "deep", every_n_epochs=9)
        measure = Measure(saves)
        found = made.set_opt_hparams(lr=0.01).fit(
            (torch.randn(8, 1024), torch.randn(8, 1024)),
            *(1,),
            callbacks=[saves, measure],
            gather=gather,
            accelerator=lab.make(),
            dataloader_options={"batch_size": 4},
            tracker=False,
            verbose=False,
        )
        peak = read_peak(measure.bytes_before)
        sys.stdout.write(f"{gather=}, rank {lab.rank}: {peak / 1e6:.0f} MB more\n")
        # The model has 12 layers; one is gathered, and copied, at a time.
        assert peak < (15 if gather and lab.rank == 0 else 3) * layer, peak
        if lab.rank == 0 and not gather:
            command = [sys.executable, "-c", EXPORT, str(found.checkpoint)]
            command.append(str(lab.folder / "deep.safetensors"))
            env = os.environ | OWN_MAPPINGS
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, check=True
            )
            sys.stdout.write(f"export: {int(done.stdout) / 1e6:.0f} MB\n")
            assert int(done.stdout) < 3 * layer, done.stdout


CASES: dict[str, Callable[[Lab], None]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
