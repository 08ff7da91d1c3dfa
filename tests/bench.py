"""Speed against open_clip and webdataset, and of pruning: each ratio is measured in one run, the two sides in turn.

    python tests/bench.py --quick            # about 3 minutes on two cores
    python tests/bench.py --device cuda      # adds bf16 and torch.compile
    python tests/bench.py --only reading --markdown

Needs open_clip_torch and webdataset. A ratio is the median over rounds of (seconds of the second side) / (seconds of the
first side); the smallest and largest round show how noisy the machine was. The sides compute the same: bench.py ends
with an error when the losses of the two CLIPs on the same weights and batch differ.
"""

import argparse
import gc
import itertools
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import common

common.import_torchvision()  # before open_clip, which imports it without the fix for a CPU-only torch
import open_clip
import webdataset
from torchvision import transforms

import eclipse

COCO = Path(__file__).resolve().parents[2] / "shared/data/coco_mini"
COLUMNS = "{:<44} {:>9} {:<22} {:>9} {:<22} {:>6} {:>13} {:>8}  {}"


@dataclass
class Bench:
    """What the command line fixes, and the table that is printed row by row."""
    device: torch.device
    batch: int
    rounds: int
    markdown: bool

    def line(self, *cells):
        print("| " + " | ".join(cells) + " |" if self.markdown else COLUMNS.format(*cells).rstrip(), flush=True)

    def compare(self, title, first, second, wanted="", note="", rounds=None):
        """Print one row. first, second: (name, function without arguments); wanted: such as ">= 1.2"."""
        for _ in range(2):
            first[1](), second[1]()
        times = [(self.seconds(first[1]), self.seconds(second[1])) for _ in range(rounds or self.rounds)]
        a, b = (statistics.median(side) for side in zip(*times))
        ratios = [second / first for first, second in times]
        ratio = statistics.median(ratios)
        if wanted:
            sign, bound = wanted.split()
            wanted += " ok" if (ratio >= float(bound) if sign == ">=" else ratio <= float(bound)) else " NO"
        self.line(title, f"{a * 1e3:.1f} ms", first[0], f"{b * 1e3:.1f} ms", second[0], f"{ratio:.2f}",
                  f"{min(ratios):.2f}-{max(ratios):.2f}", wanted, note)
        gc.collect()

    def seconds(self, function):
        self.synchronise()
        start = time.perf_counter()
        function()
        self.synchronise()
        return time.perf_counter() - start

    def synchronise(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self, precision):
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def pairs(self):
        """Random normalised pixels (B, 3, 224, 224), and texts of 8 to 40 tokens (B, 77): start, words, end, zeros."""
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(self.batch, 3, 224, 224, generator=generator)
        text = torch.randint(1, 49406, (self.batch, 77), generator=generator)
        end = torch.randint(7, 40, (self.batch, 1), generator=generator)
        text = text.scatter(1, end, 49407).masked_fill_(torch.arange(77) > end, 0)
        text[:, 0] = 49406
        return image.to(self.device), text.to(self.device)

    def our_step(self, *flags):
        """(function that makes one training step of eclipse.py, its ECLIPSE)."""
        cfg, _ = eclipse.configure([*flags, "--batch-size", str(self.batch), "--lr", "1e-6"])
        method = eclipse.build(cfg).to(self.device)
        optimiser, (amp, scaler) = eclipse.build_optimiser(method, cfg, self.device), eclipse.mixed_precision(cfg, self.device)
        eclipse.prepare_towers(method, cfg)
        image, text = self.pairs()
        now = {"keep_rate": cfg.keep_rate, "kd_weight": cfg.kd_weight}

        def step():
            terms = eclipse.backward(method, image, text, now, amp, scaler, seed=0)
            eclipse.update(method, optimiser, scaler, cfg.lr, cfg.ema)
            return terms["loss"]

        return step, method

    def open_clip_step(self, name, precision, compiled):
        """(function that makes one training step as open_clip's training loop does, its model)."""
        model = open_clip.create_model(name, device=self.device)
        groups = [[p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
        optimiser = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.5}, {"params": groups[1], "weight_decay": 0.0}],
                                      lr=1e-6, betas=(0.9, 0.98), eps=1e-8, fused=True)
        forward, loss_of, (image, text) = torch.compile(model) if compiled else model, open_clip.ClipLoss(), self.pairs()

        def step():
            optimiser.zero_grad()
            with self.autocast(precision):
                loss = loss_of(*forward(image, text))
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)
            return loss.detach()

        return step, model


def training_step(bench):
    """1. A CLIP training step against open_clip's, same weights, batch, optimiser and precision."""
    modes = [("fp32", False)] if bench.device.type == "cpu" else [("bf16", False), ("bf16", True), ("fp32", False)]
    for (precision, compiled), act in itertools.product(modes, ("quick_gelu", "gelu")):
        theirs, model = bench.open_clip_step("ViT-B-32" + "-quickgelu" * (act == "quick_gelu"), precision, compiled)
        ours, method = bench.our_step("--method", "clip", "--keep-rate", "1", "--preset", "vit_b32", "--act", act,
                                      "--precision", precision, *["--compile"] * compiled)
        method.online.load_state_dict(model.state_dict())
        a, b = ours().item(), theirs().item()
        if abs(a - b) > (1e-4 if precision == "fp32" else 0.05):
            sys.exit(f"the losses differ: {a} and open_clip's {b}")
        title = f"CLIP step, B/32, {act}, {precision}{', compiled' * compiled}"
        bench.compare(title, ("eclipse.py", ours), ("open_clip", theirs), ">= 1.0", f"losses {a:.4f}, {b:.4f}")


def pruned_inference(bench):
    """2. The image tower at keep rates below 1 against the same tower at 1."""
    cfg, _ = eclipse.configure(["--preset", "vit_b16"])
    tower, image = eclipse.build(cfg).online.visual.to(bench.device).eval(), bench.pairs()[0]

    def run(rate):
        with torch.inference_mode():
            tower(image, rate)

    full = eclipse.forward_cost(tower, image[:1], 1.0)[0]
    for rate, wanted in ((0.5, ">= 1.95"), (0.7, ">= 1.48")):
        macs = full / eclipse.forward_cost(tower, image[:1], rate)[0]
        bench.compare(f"image tower, B/16, inference, fp32, κ={rate}", (f"κ={rate}", lambda rate=rate: run(rate)),
                      ("κ=1", lambda: run(1.0)), wanted, f"MACs {macs:.2f}x", rounds=3 * bench.rounds)


def eclipse_step(bench):
    """3. What ECLIPSE's teacher, pruning and distillation cost per step, against plain CLIP."""
    for mode in [()] if bench.device.type == "cpu" else [(), ("--compile",)]:
        flags = ("--preset", "vit_b16", "--act", "quick_gelu", *mode)
        clip, _ = bench.our_step(*flags, "--method", "clip", "--keep-rate", "1")
        distilled, _ = bench.our_step(*flags, "--method", "eclipse", "--keep-rate", "0.7")
        bench.compare(f"training step, B/16{', compiled' * bool(mode)}", ("CLIP", clip), ("ECLIPSE κ=0.7", distilled), "<= 1.1")


def precision_and_compile(bench):
    """5. What bf16 autocast and torch.compile bring to our own steps (CUDA)."""
    if bench.device.type != "cuda":
        return
    for method, rate in (("clip", "1"), ("eclipse", "0.7")):
        flags = ("--preset", "vit_b16", "--method", method, "--keep-rate", rate)
        for changed, first, second in (("bf16", (), ("--precision", "fp32")), ("compile", ("--compile",), ())):
            bench.compare(f"{method} step, B/16, {changed}", (" ".join(first) or "bf16", bench.our_step(*flags, *first)[0]),
                          (" ".join(second) or "bf16", bench.our_step(*flags, *second)[0]), note="TF32 in fp32 products")


def reading(bench, count=128, size=224, batch=32):
    """4. JPEG in tar shards -> normalised float batches with tokens, in this process; JPEGs are COCO's, 640 px."""
    if not COCO.is_dir():
        return print(f"reading: skipped, {COCO} is not there")
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), count)
        cfg, _ = eclipse.configure(["--image-size", str(size), "--context-length", "77", "--vocab-size", "49408"])
        to_pixels = eclipse.Evaluator(None, cfg, torch.device("cpu"), nullcontext()).pixels
        samples = common.TrainSamples(common.TarShards(folder), common.CLIPTokenizer(), size, (0.5, 1.0), seed=0)
        mean, std = common.PIXELS[cfg.pixel_stats]
        transform = transforms.Compose([
            transforms.RandomResizedCrop(size, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(), transforms.Normalize(mean, std)])
        tokenizer = open_clip.get_tokenizer("ViT-B-32")
        shards = (webdataset.WebDataset([str(path) for path in sorted(Path(folder).glob("*.tar"))], shardshuffle=False)
                  .decode("pil").to_tuple("jpg", "txt").map_tuple(transform, lambda text: tokenizer(text)[0]).batched(batch))

        def ours():
            sampler = common.StepSampler(count, batch, count // batch)
            check([(to_pixels(image), text) for image, text, _ in common.train_loader(samples, sampler, 0, "cpu")])

        def theirs():
            check(list(shards))

        def check(batches):
            assert sum(len(image) for image, _ in batches) == count and batches[0][0].shape[1:] == (3, size, size)

        bench.compare(f"reading {count} pairs of shards, {size} px", ("TarShards", ours), ("webdataset", theirs), ">= 1.2",
                      rounds=3 * bench.rounds)


def write_shards(folder, count, shards=2):
    """The first `count` pairs of coco_mini as webdataset shards, one caption per image."""
    data = [common.CocoCaptions(COCO, split) for split in ("train", "test")]
    pairs = [d.read(i) for d in data for i in range(len(d))][:count]
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i, (image, captions) in enumerate(pairs[number::shards]):
                for name, content in ((f"{i:06d}.jpg", image), (f"{i:06d}.txt", captions[0].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


PARTS = {part.__name__: part for part in (training_step, pruned_inference, eclipse_step, reading, precision_and_compile)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu or cuda [auto]")
    parser.add_argument("--quick", action="store_true", help="3 rounds of small batches")
    parser.add_argument("--batch", type=int, help="images per step [cuda 256, cpu 16, quick 4]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the measurements")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    args = parser.parse_args()
    device = common.start_device(args.device, seed=0)
    batch = args.batch or (256 if device.type == "cuda" else 16) // (4 if args.quick else 1)
    bench = Bench(device, batch, rounds=3 if args.quick else 7, markdown=args.markdown)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    print(f"{hardware}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
          f"Python {platform.python_version()}, torch {torch.__version__}")
    print(", ".join(f"{name} {version(name)}" for name in ("torchvision", "open_clip_torch", "webdataset", "pillow", "numpy"))
          + f"; batch {batch}, {bench.rounds} rounds\n")
    bench.line("", "first", "", "second", "", "ratio", "min-max", "wanted", "")
    if args.markdown:
        bench.line(*["---"] * 9)
    for name in args.only:
        PARTS[name](bench)


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    common.run_main(main)
