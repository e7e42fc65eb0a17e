"""Every tensor is made where the others are, and a GPU is waited for no more often than is written here.

No GPU is needed: the device `meta` stands for one. Its tensors have shapes and no numbers. `Card` sees every
operation: it refuses those that mix devices, and counts those for which a program on CUDA would wait or copy.
"""
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion
import dp_sgd
import metrics
import train
import unet
import vae
from bench import gpu
from extensions import text
from support import command_line, conditions, dry_run, hardware, settings, trainable
from support.settings import METHODS

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


class Card(TorchDispatchMode):
    """counts: {(what, "file.py: function"): times}, the innermost function of the project that asked.

    what: "number" is .item(), float(a), bool(a), .tolist() of one number; "to host" and "to card" are copies;
    "search" is an operation whose result has a shape that depends on numbers. A number that is asked for is 1
    (True). AssertionError where an operation mixes devices; CPU tensors of no dimension are allowed, as on
    CUDA.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def count(self, what):
        frame = sys._getframe(2)
        while frame and (ROOT not in Path(frame.f_code.co_filename).parents
                         or frame.f_code.co_filename == __file__
                         or frame.f_code.co_name.startswith("<")):  # a comprehension, until Python 3.12
            frame = frame.f_back
        code = frame.f_code if frame else self.count.__code__
        self.counts[what, f"{Path(code.co_filename).name}: {code.co_name}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        there = [a for a in tensors if a.is_meta]
        here = [a for a in tensors if not a.is_meta and a.dim()]
        if function is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device).type
            if there and target == "cpu":
                self.count("to host")
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if here and target == "meta":
                self.count("to card")
        elif function is aten.copy_.default and there and here:
            self.count("to card" if args[0].is_meta else "to host")
            return args[0]
        elif there and function is aten._local_scalar_dense.default:
            self.count("number")
            return args[0].new_ones((), device="cpu").item()  # True of a bool
        elif there and (function in (aten.nonzero.default, aten.masked_select.default)
                        or any(a.dtype == torch.bool for a in there[1:])
                        and function in (aten.index.Tensor, aten.index_put_.default)):
            self.count("search")
            raise AssertionError(f"the shape of {function} depends on numbers: a GPU is waited for")
        elif there and here:
            raise AssertionError(f"{function} mixes devices: {[(str(a.device), *a.shape) for a in tensors]}")
        return function(*args, **kwargs)


@pytest.fixture
def card(monkeypatch):
    """The mode, not yet entered; `meta` is accepted where a program asks for a device."""
    real_generator, real_autocast = torch.Generator, torch.autocast

    class Generator(real_generator):
        def __new__(cls, device="cpu"):
            return real_generator.__new__(real_generator)

    class autocast(real_autocast):  # noqa: N801
        def __init__(self, device, *args, **kwargs):
            super().__init__("cpu" if device == "meta" else device, *args, **kwargs)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(hardware, "check_device", lambda device: None)
    return Card()


CONFIG = unet.UNetConfig(4, 4, 16, (1,), attention_resolutions=(1,), context_dim=8, num_groups=8)


def private(kind, tune, method, n=3, k=2):
    """(engine, loss_fn, batch) on the card: a small network, n latents of 4x4, k draws."""
    embedder = {"class": unet.ClassEmbedder(10, 8, True), "text": text.TextEncoder(20, 8, 5, 16, 1)}[kind]
    model = hardware.laid_out(unet.LatentModel(unet.UNet(CONFIG), embedder), "meta")
    schedule = diffusion.Schedule("cosine", "v")
    trainable.choose(model, SimpleNamespace(tune=tune, from_block=0, vae=vae.VAEConfig(), schedule=schedule))
    engine = dp_sgd.DPSGD(model, 1e-3, 1.0, n, method=METHODS[method])
    z, y = torch.randn(n, 2, 4, 4, 4, device="meta"), hardware.stand_in(model, n, "meta")
    null = conditions.null(SimpleNamespace(cond_drop=0.1), model, y)
    batch = diffusion.draw(z, y, k, None, schedule, null, 0.1)
    diffusion.alphas_cumprod(schedule, torch.device("meta"))  # sent to the card once
    return engine, partial(diffusion.loss, schedule=schedule), batch


@pytest.mark.parametrize("kind,tune,method", [*(("class", "attention", method) for method in METHODS),
                                              ("text", "all", "bookkeeping"),
                                              ("class", "shift", "bookkeeping"),
                                              ("text", "attention+shift", "bookkeeping")])
def test_a_micro_batch_never_waits_for_the_card(card, kind, tune, method):
    with card:
        engine, loss_fn, batch = private(kind, tune, method)
        card.counts.clear()
        engine.accumulate(loss_fn, *batch)
    assert not card.counts
    assert all(a.is_meta for a in engine.sums) and all(a.is_meta for a in engine.metrics)


def test_a_step_waits_for_the_metrics_once_and_sends_the_noise(card):
    with card:
        engine, loss_fn, batch = private("class", "attention", "bookkeeping")
        card.counts.clear()
        engine.accumulate(loss_fn, *batch)
        engine.accumulate(loss_fn, *batch)
        engine.step(torch.optim.Adam(engine.parameters, 1e-3))
    # The bytes of the noise come from the host; all these parameters are smaller than a chunk.
    assert card.counts.pop(("to card", "dp_sgd.py: normals")) == len(engine.parameters)
    assert card.counts == {("to host", "dp_sgd.py: summary"): 1}
    assert engine.last["examples"] == 2 * 3


@pytest.mark.parametrize("mistake", ["a mixed device", "a bool", "a search"])
def test_the_card_sees_what_it_is_there_to_see(card, mistake):
    a = torch.zeros(3, device="meta")
    with card, pytest.raises(AssertionError):
        if mistake == "a mixed device":
            a + torch.zeros(3)
        elif mistake == "a search":
            a[a > 0]
        else:
            bool(a.any())
            assert not card.counts


def test_a_whole_run_keeps_to_its_device(card, tmp_path):
    """The three stages, the release and its images; how often each place of the loops waits or copies."""
    steps = 2
    with card:
        train.main([*gpu.TINY, "--device", "meta", "--precision", "float32", "--out", str(tmp_path / "run"),
                    "--steps", str(steps), "--micro-batch", "8"])
    places = {key: n for key, n in card.counts.items() if key[1].startswith(("train.py", "dp_sgd.py"))}
    noise = places.pop(("to card", "dp_sgd.py: normals"))
    assert noise % steps == 0  # one tensor for each that is trained
    assert places == {
        ("to card", "train.py: loss_fn"): 2, ("to host", "train.py: loss_fn"): 2,  # 2 steps of public images
        ("to card", "train.py: train_autoencoder"): 1, ("to card", "train.py: encode"): 2,
        ("number", "dp_sgd.py: check_against_loop"): 1,
        # the private stage, whose batches are several micro-batches: its indices once, the metrics once
        ("to card", "train.py: tune_privately"): steps, ("to host", "dp_sgd.py: summary"): steps}


def test_scoring_keeps_to_its_device(card):
    images, labels = torch.randint(256, (12, 1, 16, 16), dtype=torch.uint8), torch.arange(12) % 2
    with card:
        model = metrics.train_classifier("small-cnn", images, labels, 2, epochs=1, lr=1e-3, batch=4,
                                         anneal=True, augment=True, device="meta", progress=False)
        assert metrics.features(model, images).device.type == "cpu"
    waits = {key: n for key, n in card.counts.items() if key[0] != "to card"}
    # once an epoch for the bar, once for each 500 images that are looked at
    assert waits == {("number", "metrics.py: train_classifier"): 1, ("to host", "metrics.py: predict"): 1}


# ----------------------------------------------------------------------------------------------------- memory


def test_out_of_memory_names_the_stage_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    out, calls = tmp_path / "run", []
    flags = [*gpu.TINY, "--device", "cpu", "--precision", "float32", "--micro-batch", "8", "--out", str(out)]

    def full(*args, **kwargs):
        calls.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for place, name, flag in ((vae, "loss", "--vae-batch"), (diffusion, "loss", "--ldm-batch"),
                              (dp_sgd.DPSGD, "accumulate", "--micro-batch")):
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as left:
            patched.setattr(place, name, full)
            command_line.run_cli(lambda: train.main([*flags, "--resume", "auto"]))
        line = capsys.readouterr().err.splitlines()[-1]
        assert left.value.code == 2 and line.startswith("error: out of memory in") and flag in line
    assert len(calls) == 3
    train.main(["--resume", "--out", str(out), "--micro-batch", "4", "--device", "cpu"])
    assert (out / "release" / "privacy.json").exists()
    assert len((out / "internal" / "ledger.jsonl").read_text().splitlines()) == 2


def test_the_plan_names_the_largest_micro_batch(monkeypatch, capsys):
    assert hardware.largest_batch(free=1000, fixed=100, per_image=6) == 100
    assert hardware.largest_batch(free=1000, fixed=900, per_image=6) == 0
    assert hardware.largest_batch(free=1000, fixed=2000, per_image=6) == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10 ** 9, 80 * 10 ** 9))
    found = {}
    for k, method in ((1, "bookkeeping"), (4, "bookkeeping"), (1, "loop")):
        s = settings.parse(["--preset", "celeba256-text", "--device", "cpu", "--noise-multiplicity", str(k),
                            "--method", method])
        s.device = "cuda"
        with torch.device("meta"):
            model = unet.LatentModel(unet.UNet(s.unet), text.TextEncoder(100, s.unet.context_dim, 56, 512, 4))
        trainable.choose(model, s)
        dry_run.print_memory(s, model, range(1000), range(1000))
        line = capsys.readouterr().out.splitlines()[-1]
        taken = hardware.micro_batch(s, model, (4, 64, 64))
        assert f"80.0 free on cuda, about {taken} private images at a time; --micro-batch at most " in line
        found[k, method] = int(line.split()[-1])
    one, four, loop = found.values()
    assert one > four > 1 and abs(one - 4 * four) <= 4  # K draws are K times the memory
    assert one > loop  # which keeps the gradient of every image


def test_a_gpu_takes_as_many_images_at_a_time_as_half_of_its_memory_holds(monkeypatch):
    monkeypatch.setattr(hardware, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10 ** 9, 80 * 10 ** 9))
    found = {}
    for key, side, *flags in (("small", 4, "digits"), ("given", 4, "digits", "--micro-batch", "7"),
                              ("large", 16, "cifar10"), ("K", 16, "cifar10", "--noise-multiplicity", "4"),
                              ("loop", 16, "cifar10", "--method", "loop")):
        s = settings.parse(["--preset", *flags, "--device", "cuda"])
        with torch.device("meta"):
            model = unet.LatentModel(unet.UNet(s.unet), unet.ClassEmbedder(10, s.unet.context_dim))
        trainable.choose(model, s)
        before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
        found[key] = hardware.micro_batch(s, model, (s.unet.in_channels, side, side))
        assert all(p is before[name][0] and p.requires_grad == before[name][1]
                   for name, p in model.named_parameters())
    assert settings.parse(["--device", "cpu"]).micro_batch == 256  # the preset's, for the CPU's cache
    assert found["small"] == hardware.LARGEST and found["given"] == 7
    assert hardware.LARGEST > found["large"] > found["loop"] > 1
    assert abs(found["large"] - 4 * found["K"]) <= 4
    # What is kept of so many images, and a third more, fits half of the memory.
    s = settings.parse(["--preset", "cifar10"])
    with torch.device("meta"):
        model = unet.LatentModel(unet.UNet(s.unet), unet.ClassEmbedder(10, s.unet.context_dim))
    each = hardware.bytes_of_one_latent(model, (s.unet.in_channels, 16, 16)) * 4 / 3
    assert 0.8 * 40e9 < found["large"] * each < 40e9


def test_without_a_gpu_nothing_is_recorded_and_images_stay():
    def function():
        return 1
    assert hardware.recorded(function, torch.Generator()) is function
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert hardware.kept_on(images, "cpu") is images
