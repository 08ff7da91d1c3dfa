"""Speed against open_clip, transformers, webdataset and faiss, what pruning brings; each ratio is measured in one run.

    python tests/bench.py --quick            # a few minutes on two cores
    python tests/bench.py --device cuda      # adds bf16 and torch.compile

A ratio is the median over rounds of (seconds of the second side) / (seconds of the first side); its smallest and
largest round show how noisy the machine was. The bench stops when the losses of the two CLIPs differ.
"""

import argparse
import itertools
import logging
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clip_cid
import common
import dlip
import eclipse
import numpy as np
import torch

COCO = Path(__file__).resolve().parents[2] / "shared/data/coco_mini"
PACKAGES = "torch", "torchvision", "open_clip_torch", "transformers", "webdataset", "faiss-cpu", "pillow", "numpy"
COLUMNS = "{:<34}  {:<22} {:>11}  {:<22} {:>11}  {:>5}  {:>11}  {:<10}  {}"


def compare(args, title, first, second, wanted="", note="", longer=1):
    """Print one row. first, second: (name, function without arguments); wanted: such as ">= 1.2"."""
    def seconds(function):
        start = time.perf_counter()
        function()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds = [(seconds(first[1]), seconds(second[1])) for _ in range(2 + longer * args.rounds)][2:]  # 2: warm-up
    ratio = statistics.median(ratios := [b / a for a, b in rounds])
    if wanted:
        sign, bound = wanted.split()
        wanted += " ok" if (ratio >= float(bound) if sign == ">=" else ratio <= float(bound)) else " NO"
    a, b = (f"{statistics.median(side) * 1e3:.1f} ms" for side in zip(*rounds))
    cells = a, second[0], b, f"{ratio:.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}", wanted, note
    print(COLUMNS.format(title, first[0], *cells).rstrip(), flush=True)


def pairs(args):
    """Normalised pixels (B, 3, 224, 224), and texts of 8 to 40 tokens (B, 77): start, words, end, zeros."""
    torch.manual_seed(0)
    image, text = torch.randn(args.batch, 3, 224, 224), torch.randint(1, 49406, (args.batch, 77))
    end = torch.randint(7, 40, (args.batch, 1))
    text = text.scatter(1, end, 49407).masked_fill(torch.arange(77) > end, 0)
    text[:, 0] = 49406
    return image.to(args.device), text


def our_step(args, *flags):
    """(function that makes one training step of eclipse.py, its ECLIPSE); the batch is as our loader collates it."""
    cfg, _ = eclipse.configure([*flags, "--batch-size", str(args.batch), "--lr", "1e-6"])
    method = eclipse.build(cfg).to(args.device)
    optimiser, precision = eclipse.build_optimiser(method, cfg, args.device), common.mixed_precision(cfg, args.device)
    eclipse.prepare_towers(method, cfg)
    image, text = pairs(args)
    _, text, _ = common._collate_train([(x, tokens, 0) for x, tokens in zip(image, text)])
    text, now = text.to(args.device), {"keep_rate": cfg.keep_rate, "kd_weight": cfg.kd_weight}

    def step():
        terms = eclipse.backward(method, image, text, now, *precision, seed=0)
        eclipse.update(method, optimiser, precision[1], cfg.lr, cfg.ema)
        return terms["loss"]

    return step, method


def open_clip_step(args, name, precision, compiled):
    """(function that makes one training step as open_clip's training loop does, its model)."""
    import open_clip
    model = open_clip.create_model(name, device=args.device)
    optimiser = eclipse.build_optimiser(model, eclipse.Config(lr=1e-6), args.device)  # torch's fused AdamW
    forward, loss_of = torch.compile(model) if compiled else model, open_clip.ClipLoss()
    image, text = (x.to(args.device) for x in pairs(args))

    def step():
        optimiser.zero_grad()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(*forward(image, text))
        loss.backward()
        optimiser.step()
        model.logit_scale.data.clamp_(0, 4.6052)
        return loss.detach()

    return step, model


def clip_step(args):
    """A CLIP training step against open_clip's: same weights, batch, optimiser and precision."""
    modes = [("fp32", False)] if args.device.type == "cpu" else [("bf16", False), ("bf16", True), ("fp32", False)]
    names = {"quick_gelu": "ViT-B-32-quickgelu", "gelu": "ViT-B-32"}
    for (precision, compiled), (act, name) in itertools.product(modes, names.items()):
        theirs, model = open_clip_step(args, name, precision, compiled)
        ours, method = our_step(args, "--method", "clip", "--keep-rate", "1", "--preset", "vit_b32", "--act", act,
                                "--precision", precision, *["--compile"] * compiled)
        method.online.load_state_dict(model.state_dict())
        a, b = ours().item(), theirs().item()
        if abs(a - b) > (1e-4 if precision == "fp32" else 0.05):
            sys.exit(f"{name}, {precision}: our loss is {a}, open_clip's {b}")
        compare(args, f"CLIP step, B/32, {precision}" + ", compiled" * compiled, ("eclipse.py", ours),
                (f"open_clip, {act}", theirs), ">= 1.0", f"losses {a:.5f} {b:.5f}")


def pruned_inference(args):
    """The image tower at keep rates below 1 against the same tower at 1."""
    cfg, _ = eclipse.configure(["--preset", "vit_b16"])
    tower, image = eclipse.build(cfg).online.visual.to(args.device).eval(), pairs(args)[0]

    @torch.inference_mode()
    def encode(rate):
        tower(image, rate)

    for rate, wanted in ((0.5, ">= 1.95"), (0.7, ">= 1.48")):
        macs = eclipse.forward_cost(tower, image[:1], 1.0)[0] / eclipse.forward_cost(tower, image[:1], rate)[0]
        compare(args, "image tower, B/16, inference, fp32", (f"κ={rate}", lambda rate=rate: encode(rate)),
                ("κ=1", lambda: encode(1.0)), wanted, f"MACs {macs:.2f}x", longer=3)


def eclipse_step(args):
    """What ECLIPSE costs against CLIP; on CUDA also what bf16 and torch.compile bring to both."""
    clip, ours = ("--method", "clip", "--keep-rate", "1"), ("--method", "eclipse", "--keep-rate", "0.7")
    rows = [("", ("CLIP", *clip), ("ECLIPSE κ=0.7", *ours), "<= 1.1"),
            (", compiled", ("CLIP", *clip, "--compile"), ("ECLIPSE κ=0.7", *ours, "--compile"), "<= 1.1")]
    for name, flags in ((", CLIP", clip), (", ECLIPSE", ours)):
        rows += [(name, ("bf16", *flags), ("fp32, TF32 products", *flags, "--precision", "fp32"), ""),
                 (name, ("compiled", *flags, "--compile"), ("eager", *flags), "")]
    for what, *sides, wanted in rows if args.device.type == "cuda" else rows[:1]:
        sides = [(name, our_step(args, "--preset", "vit_b16", *flags)[0]) for name, *flags in sides]
        compare(args, f"step, B/16{what}", *sides, wanted)


def reading(args, count=64, size=224, batch=32):
    """JPEG and text in tar shards -> normalised float batches with tokens, in this process."""
    import open_clip
    import webdataset
    from torchvision import transforms
    if not COCO.is_dir():
        return print(f"reading: skipped, {COCO} is not there")
    cfg, _ = eclipse.configure(["--image-size", str(size)])
    statistics = eclipse.Evaluator(None, cfg, torch.device("cpu"), nullcontext()).statistics
    crop = transforms.RandomResizedCrop(size, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(*common.PIXELS[cfg.pixel_stats])
    transform, tokenizer = transforms.Compose([crop, to_tensor, normalise]), open_clip.get_tokenizer("ViT-B-32")

    def read(loader, finish):
        assert [finish(image).shape for image, *_ in loader] == [(batch, 3, size, size)] * (count // batch)

    with tempfile.TemporaryDirectory() as folder:
        with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=count // 2, verbose=0) as shards:
            for i, (image, captions) in enumerate(map(common.CocoCaptions(COCO, "train").read, range(count))):
                shards.write({"__key__": f"{i:06d}", "jpg": image, "txt": captions[0]})
        samples = common.TrainSamples(common.TarShards(folder), common.CLIPTokenizer(), size, (0.5, 1.0), seed=0)
        ours = common.train_loader(samples, common.StepSampler(count, batch, count // batch), 0, "cpu")
        theirs = webdataset.WebDataset(sorted(map(str, Path(folder).glob("*.tar"))), shardshuffle=False).decode("pil")
        theirs = theirs.to_tuple("jpg", "txt").map_tuple(transform, lambda text: tokenizer(text)[0]).batched(batch)
        compare(args, f"reading {count} COCO pairs, {size} px",
                ("TarShards", lambda: read(ours, lambda image: eclipse.normalise(image, statistics))),
                ("webdataset", lambda: read(theirs, torch.Tensor.float)), ">= 1.2", longer=3)


def clip_cid_step(args):
    """What cluster and instance discrimination cost: teacher of width 1280, k = 10,000, as for CC3M."""
    flags, sides = ["--preset", "vit_b32", "--data", "cc3m", "--lr", "1e-6", "--batch-size", str(args.batch)], []
    for method in ("clip_cid", "clip"):
        cfg, _ = clip_cid.configure([*flags, "--teacher", str(clip_cid.DEMO_TEACHER), "--method", method])
        from_teacher = dict(centroids=torch.randn(cfg.k, 1280), teacher_logit_scale=4.6) if method == "clip_cid" else {}
        model = clip_cid.build(cfg, **from_teacher).to(args.device)
        batch = [torch.randn(args.batch, 1280), torch.randn(args.batch, 1280), torch.randint(cfg.k, (args.batch,))]
        batch = clip_cid.to_device(batch if from_teacher else [], args.device)
        optimiser = clip_cid.build_optimiser(model, cfg, args.device)
        precision, (image, text) = common.mixed_precision(cfg, args.device), pairs(args)

        def step(model=model, batch=batch, optimiser=optimiser, precision=precision, image=image, text=text):
            clip_cid.backward(model, image, text, batch, *precision, seed=0)
            clip_cid.update(model, optimiser, precision[1], 1e-6)

        sides.append((method, step))
    compare(args, "step, B/32, k = 10,000", *reversed(sides), "<= 1.1")


def blip(args, length=30):
    """A captioning step and beam search of BLIP base against transformers', same weights; the time of small + small."""
    import transformers
    transformers.logging.set_verbosity_error()
    text = dict(bos_token_id=30522, sep_token_id=102, eos_token_id=102, label_smoothing=0.1, num_attention_heads=12)
    config = transformers.BlipConfig(text_config=text, vision_config=dict(image_size=224, layer_norm_eps=1e-6))
    theirs = transformers.BlipForConditionalGeneration(config).to(args.device)
    ours = dlip.load_blip(theirs.state_dict(), dropout=0.0)[0].to(args.device)
    small = dlip.BLIP(dlip.VIT["small"], dlip.BERT["small"]).to(args.device)
    image, ids = pairs(args)[0], torch.randint(1000, 30000, (args.batch, length), device=args.device)
    ids[:, 0], ids[:, -1] = 30522, 102

    def step(model, loss_of):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def one():
            loss = loss_of()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.item()

        return one

    def caption_loss(model):
        return lambda: dlip.lm_loss(model.decode(ids, None, model.encode_image(image)), ids)

    steps = {name: step(model, caption_loss(model)) for name, model in (("ours", ours), ("small", small))}
    their_step = step(theirs, lambda: theirs(image, ids, labels=ids).loss)
    a, b = steps["ours"](), their_step()
    if abs(a - b) > 1e-3:
        sys.exit(f"BLIP: our loss is {a}, that of transformers {b}")
    compare(args, "captioning step, BLIP base, fp32", ("dlip.py", steps["ours"]), ("transformers", their_step),
            ">= 1.0", f"losses {a:.5f} {b:.5f}")
    compare(args, "captioning step, fp32", ("small + small", steps["small"]), ("base + base", steps["ours"]))
    ours.eval(), theirs.eval()
    prompt = dict(num_beams=3, min_length=20, max_length=20)
    with torch.inference_mode():
        states = ours.encode_image(image)
        compare(args, "beam search, 3 beams, 20 tokens", ("dlip.py", lambda: ours.generate(states, **prompt)),
                ("transformers", lambda: theirs.text_decoder.generate(
                    torch.full((args.batch, 1), 30522, device=args.device), encoder_hidden_states=states,
                    eos_token_id=102, pad_token_id=0, **prompt)), ">= 1.0")


def embeddings(args, folder):
    """args.images unit vectors of width 512, fp16, in a .npy file: a third are near copies of others, in clusters."""
    torch.manual_seed(0)
    n, width = args.images, 512
    array = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float16, (n, width))
    centres = torch.randn(n // 50, width)
    x = clip_cid.unit(centres[torch.randint(len(centres), (n,))] + torch.randn(n, width))
    copies = torch.randperm(n)[:n // 3]
    x[copies] = clip_cid.unit(x[torch.randint(n, (len(copies),))] + 0.01 * torch.randn(len(copies), width))
    array[:] = x.half().numpy()
    array.flush()
    return common.Rows([np.load(f"{folder}/x.npy", mmap_mode="r")], np.arange(n), args.device)


def peak_memory(restart=False):
    """MB that the process has held at most, since the last restart of the count (Linux; elsewhere 0)."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def balance(args, eps=0.447):
    """All pairs closer than ε, their groups and the kept images, against faiss's exact range search; one run each."""
    import faiss
    with tempfile.TemporaryDirectory() as folder:
        x = embeddings(args, folder)
        before, start = peak_memory(restart=True), time.perf_counter()
        group, _, pairs = clip_cid.find_groups(x, 4096, eps=eps)
        kept = clip_cid.centres(x, group, 4096)
        ours = time.perf_counter() - start
        memory = peak_memory() - before
        start = time.perf_counter()
        _, found, _ = clip_cid.find_groups(x, 4096, remove=0.437)
        removing = time.perf_counter() - start
        rows = x[:].cpu().numpy()
        faiss.omp_set_num_threads(torch.get_num_threads())
        start = time.perf_counter()
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        limits, _, _ = index.range_search(rows, 1 - eps ** 2 / 2)
        theirs = time.perf_counter() - start
    their_pairs = (int(limits[-1]) - len(rows)) // 2  # each twice, and each vector with itself
    print(f"balance, {len(rows):,} x {rows.shape[1]}: clip_cid.py {ours:.1f} s with groups and centres ({pairs:,} "
          f"pairs, {len(kept):,} kept, {memory:.0f} MB above the memory before), faiss range search alone {theirs:.1f} "
          f"s ({their_pairs:,} pairs): ratio {theirs / ours:.2f}; with --remove 0.437 {removing:.1f} s (ε {found:.4f})"
          f", ratio {theirs / removing:.2f}")


def clustering(args, k=1000, iterations=10):
    """Spherical k-means against faiss's: the mean cosine reached, and the time."""
    import faiss
    with tempfile.TemporaryDirectory() as folder:
        x = embeddings(args, folder)
        rows = x[:].cpu().numpy()
        faiss.omp_set_num_threads(torch.get_num_threads())
        start = time.perf_counter()
        _, _, objective = clip_cid.kmeans(x, k, iterations, 0, 4096)
        ours, start = time.perf_counter() - start, time.perf_counter()
        theirs = faiss.Kmeans(rows.shape[1], k, niter=iterations, spherical=True, max_points_per_centroid=len(rows))
        theirs.train(rows)
        seconds = time.perf_counter() - start
        centroids = clip_cid.unit(torch.from_numpy(theirs.centroids)).to(args.device)
        parts = [clip_cid.nearest_centroid(x[i:i + 4096], centroids, 4096)[1] for i in range(0, len(x), 4096)]
        reached = torch.cat(parts).mean().item()
    print(f"k-means, {len(rows):,} x {rows.shape[1]}, k = {k}, {iterations} iterations: mean cosine "
          f"{objective[-1]:.5f} (faiss {reached:.5f}), {ours:.1f} s (faiss {seconds:.1f} s), ratio "
          f"{seconds / ours:.2f}")


PARTS = {part.__name__: part for part in
         (clip_step, pruned_inference, eclipse_step, clip_cid_step, blip, reading, balance, clustering)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu or cuda [auto]")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7, of smaller batches")
    parser.add_argument("--batch", type=int, help="images per step [cuda 256, cpu 16; quick: a quarter]")
    parser.add_argument("--images", type=int, default=200_000, help="vectors for balance and clustering [200000]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the measurements")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns that its weights are random
    common.import_torchvision()  # before open_clip, which imports it without the remedy for a CPU-only torch
    args.device, args.rounds = common.start_device(args.device, seed=0), 3 if args.quick else 7
    args.batch = args.batch or (256 if args.device.type == "cuda" else 16) // (4 if args.quick else 1)
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    names = re.findall("model name.*: (.*)", info.read_text())[:1] if info.exists() else [platform.processor()]
    hardware = torch.cuda.get_device_name() if args.device.type == "cuda" else names[0]
    print(f"{hardware}; {os.cpu_count()} cores, {torch.get_num_threads()} threads; batch {args.batch}, "
          f"{args.rounds} rounds (thrice for inference and reading)\nPython {platform.python_version()}, "
          f"{', '.join(f'{name} {version(name)}' for name in PACKAGES)}\n")
    print(COLUMNS.format("measured", "first", "time", "second", "time", "ratio", "min-max", "wanted", "note"))
    for name in args.only:
        PARTS[name](args)


if __name__ == "__main__":
    common.run_main(main)
