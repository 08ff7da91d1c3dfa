"""Speed against open_clip, transformers, webdataset and faiss, what pruning brings; each ratio is measured in one run.

    python tests/bench.py --quick            # a few minutes on two cores
    python tests/bench.py --device cuda      # adds bf16 and torch.compile

A ratio is the median over rounds of (seconds of the second side) / (seconds of the first side); its smallest and
largest round show how noisy the machine was. The bench stops when the losses of the two sides differ.
"""

import argparse
import contextlib
import io
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clip_cid
import common
import dlip
import eclipse
import torch
from PIL import Image

COCO = Path(__file__).resolve().parents[2] / "shared/data/coco_mini"
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = "torchvision", "open_clip_torch", "transformers", "webdataset", "faiss-cpu", "pillow", "numpy"


def timed(args, function, *inputs):
    """(seconds, result) of a call, the device's work included."""
    start = time.perf_counter()
    result = function(*inputs)
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(args, title, sides, wanted="", longer=1, tolerance=None, rounds=None, note=""):
    """Print and keep one row. sides: {name: function without arguments}, two; wanted: such as ">= 1.2".

    tolerance: how far the losses that the two return may be apart, else UserError. rounds: that many and no warm-up.
    """
    (first, second), functions = sides, sides.values()
    if tolerance:
        a, b = (float(function()) for function in functions)
        note = f"losses {a:.5f} {b:.5f}"
        if abs(a - b) > tolerance:
            raise common.UserError(f"{title}, {first} and {second}: {note}")
    times = [[timed(args, function)[0] for function in functions] for _ in range(rounds or 2 + longer * args.rounds)]
    if not rounds:
        del times[:2]  # the warm-up
    a, b = (1e3 * statistics.median(side) for side in zip(*times))
    ratios = [b / a for a, b in times]
    median, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"{title:<37}  {first:<14} {a:>8.1f} ms  {second:<21} {b:>8.1f} ms  {median:>5.2f}  "
          f"{least:>5.2f}-{most:<5.2f}  {wanted:<7}  {note}", flush=True)
    args.rows.append({"measured": title, "first": first, "first_ms": a, "second": second, "second_ms": b,
                      "ratio": median, "least": least, "most": most, "rounds": len(times), "wanted": wanted,
                      "note": note})


def pairs(args):
    """Normalised pixels (B, 3, 224, 224), and texts of 8 to 40 tokens (B, 77): start, words, end, zeros."""
    torch.manual_seed(0)
    image, text = torch.randn(args.batch, 3, 224, 224), torch.randint(1, 49406, (args.batch, 77))
    end = torch.randint(7, 40, (args.batch, 1))
    text = text.scatter(1, end, 49407).masked_fill(torch.arange(77) > end, 0)
    text[:, 0] = 49406
    return image.to(args.device), text.to(args.device)


def our_step(args, script, *flags, others=(), **taught):
    """(function that makes one training step of eclipse.py or clip_cid.py, its model)."""
    cfg, *_ = script.configure([*flags, f"--batch-size={args.batch}", "--lr=1e-6"])
    model = script.build(cfg, **taught).to(args.device)
    optimiser = script.build_optimiser(model, cfg, args.device)
    amp, scaler = common.mixed_precision(cfg.precision, args.device)
    script.prepare_towers(model, cfg)
    image, text = pairs(args)
    text = common.trim_padding(text)  # as our loader does

    def step():
        teaching = others
        if script is eclipse:
            with amp:
                teaching = *model.teach(image, text), cfg.kd_weight
        terms = script.backward(model, image, text, teaching, amp, scaler)
        script.update(model, optimiser, scaler, cfg.lr)
        if script is eclipse:
            model.update_momentum(cfg.ema)
        return terms["loss"]

    return step, model


def plain_step(model, loss_of):
    """A function that makes one training step of a model, with our optimiser: torch's fused AdamW."""
    optimiser = eclipse.build_optimiser(model, eclipse.Config(lr=1e-6), next(model.parameters()).device)

    def step():
        loss = loss_of()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def open_clip_step(args, name, precision, compiled):
    """(function that makes one training step as open_clip's training loop does, its model)."""
    import open_clip
    model = open_clip.create_model(name, device=args.device)
    forward, loss_of = torch.compile(model) if compiled else model, open_clip.ClipLoss()
    image, text = pairs(args)

    def loss():
        model.logit_scale.data.clamp_(0, 4.6052)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return loss_of(*forward(image, text))

    return plain_step(model, loss), model


def clip_step(args):
    """A CLIP training step against open_clip's: same weights, batch, optimiser and precision."""
    cuda = args.device.type == "cuda"
    modes = [("bf16", False), ("bf16", True)] if cuda else [("fp32", False)]
    for preset, act, name in (("vit_b32", "quick_gelu", "ViT-B-32-quickgelu"), ("vit_b32", "gelu", "ViT-B-32"),
                              ("vit_b16", "gelu", "ViT-B-16"))[cuda:]:
        for precision, compiled in modes:
            theirs, model = open_clip_step(args, name, precision, compiled)
            ours, method = our_step(args, eclipse, "--method=clip", f"--preset={preset}", f"--act={act}",
                                    f"--precision={precision}", *["--compile"] * compiled)
            method.online.load_state_dict(model.state_dict())
            tolerance = 1e-4 if precision == "fp32" else 0.05
            compare(args, f"CLIP step, {name[4:]}, {precision}" + ", compiled" * compiled,
                    {"eclipse.py": ours, "open_clip": theirs}, ">= 1.0", tolerance=tolerance)


def dlip_step(args, *flags):
    """A function that makes one pre-training step of dlip.py's small student at 224 px."""
    cfg, _ = dlip.configure(["--stage=distil", "--data=coco", f"--batch-size={args.batch}", *flags])
    student = dlip.BLIP(dlip.size_of(cfg, common.BertTokenizer(30)))
    model = dlip.DLIP(cfg, student).to(args.device).train()
    optimiser = dlip.build_optimiser(student, cfg, args.device)
    amp, scaler = common.mixed_precision(cfg.precision, args.device)
    teacher = None
    if dlip.distils(cfg):
        teacher = dlip.BLIP(dlip.BLIPSize(dlip.VIT["base"], dlip.BERT["base"])).to(args.device).eval()
        teacher.requires_grad_(False)
    if cfg.compile:
        for blip in filter(None, (student, model.momentum, teacher)):
            blip.visual_encoder.compile()
    image, ids = pairs(args)[0], captions(args)
    number = torch.arange(args.batch, device=args.device)

    def step():
        with amp:
            loss, terms = model(image, [ids], number, cfg.alpha, teacher)
        scaler.scale(loss).backward()
        dlip.update(student, optimiser, scaler, 1e-6)
        return terms["loss"]

    return step


def captions(args, tokens=30):
    """(B, tokens) ids for BERT."""
    ids = torch.randint(1000, 30000, (args.batch, tokens), device=args.device)
    ids[:, 0], ids[:, -1] = 30522, 102
    return ids


def pretraining(args):
    """What distillation costs DLIP's small student, base teacher."""
    compare(args, "pre-training step, BLIP small", {"blip": dlip_step(args, "--method=blip"),
                                                    "dlip, base teacher": dlip_step(args)})


PEAK = 989e12  # FLOP/s in bf16 without sparsity: H100 SXM and H200, their data sheets


def utilisation(args):
    """CUDA: images/s, memory and share of the peak's FLOP/s of each method's step, with and without --compile."""
    if args.device.type == "cpu":
        return print("utilisation: skipped, CUDA only")
    from torch.utils.flop_counter import FlopCounterMode
    for compiled in ([], ["--compile"]):
        for name, step in {
            "CLIP, B/16": lambda: our_step(args, eclipse, "--preset=vit_b16", "--method=clip", *compiled)[0],
            "ECLIPSE κ=0.7, B/16": lambda: our_step(args, eclipse, "--preset=vit_b16", *compiled)[0],
            "CLIP-CID, B/32": lambda: clip_cid_steps(args, *compiled)["clip_cid"],
            "DLIP, small from base": lambda: dlip_step(args, *compiled),
        }.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step = step()
            if not compiled:
                with FlopCounterMode(display=False) as counter:
                    step()
                args.flops[name] = counter.get_total_flops()
            times = [timed(args, step)[0] for _ in range(3 + args.rounds)][3:]
            seconds = statistics.median(times)
            title = f"step, {name}, {'compiled' if compiled else 'eager'}, batch {args.batch}"
            note = (f"{args.batch / seconds:.0f} images/s, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
                    f"{args.flops[name] / seconds / PEAK:.1%} of {PEAK / 1e12:.0f} TFLOP/s")
            print(f"{title:<55} {note}", flush=True)
            args.rows.append({"measured": title, "note": note})
            del step


def pruned_inference(args):
    """The image tower at keep rates below 1 against the same tower at 1."""
    cfg, *_ = eclipse.configure(["--preset=vit_b16"])
    tower, image = eclipse.build(cfg).online.visual.to(args.device).eval(), pairs(args)[0]
    amp, _ = common.mixed_precision("auto", args.device)
    encode = torch.inference_mode()(amp(tower))
    full = common.multiply_adds(tower, image[:1])
    for rate, wanted in ((0.5, ">= 1.95"), (0.7, ">= 1.48")):
        macs = full / common.multiply_adds(tower, image[:1], rate)
        compare(args, f"inference, B/16, MACs {macs:.2f}x",
                {f"κ={rate}": partial(encode, image, rate), "κ=1": partial(encode, image)}, wanted, longer=3)


def eclipse_step(args):
    """What ECLIPSE costs against CLIP."""
    clip, _ = our_step(args, eclipse, "--preset=vit_b16", "--method=clip")
    ours, _ = our_step(args, eclipse, "--preset=vit_b16", "--keep-rate=0.7")
    compare(args, "step, B/16", {"CLIP": clip, "ECLIPSE κ=0.7": ours}, "<= 1.05")


def write_shards(folder, count):
    """The first `count` COCO photographs, each with one caption, in two tar shards."""
    import webdataset
    content = common.read_json(COCO / "annotations/captions_train2017.json")
    caption_of = {caption["image_id"]: caption["caption"] for caption in content["annotations"]}
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=count // 2, verbose=0) as shards:
        for image in content["images"][:count]:
            pixels, caption = COCO / "train2017" / image["file_name"], caption_of[image["id"]]
            shards.write({"__key__": str(image["id"]), "jpg": pixels.read_bytes(), "txt": caption})


def reading(args, count=64, batch=32):
    """JPEG and text in tar shards -> normalised float batches with tokens, in this process."""
    import open_clip
    import webdataset
    from torchvision import transforms
    if not COCO.is_dir():
        return print(f"reading: skipped, {COCO} is not there")
    size = common.PRESETS["vit_b32"]
    side, scale, pixels = size.image_size, (0.5, 1.0), size.pixel_statistics("cpu")
    crop = transforms.RandomResizedCrop(side, scale, interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(size.mean, size.std)])
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def read(loader, finish):
        assert sum(len(finish(image)) for image, *_ in loader) == count

    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, count)
        samples = common.TrainSamples(common.TarShards(folder), common.CLIPTokenizer(), side, scale, 0)
        cfg = SimpleNamespace(batch_size=batch, seed=0, workers=0)
        ours = partial(common.train_loader, samples, cfg, count // batch, 0, torch.device("cpu"))
        theirs = webdataset.WebDataset(f"{folder}/{{00000..00001}}.tar", shardshuffle=False).decode("pil")
        theirs = theirs.to_tuple("jpg", "txt").map_tuple(transform, lambda text: tokenizer(text)[0]).batched(batch)
        compare(args, f"reading {count} COCO pairs, {side} px",
                {"TarShards": lambda: read(ours(), partial(common.normalise, statistics=pixels)),
                 "webdataset": lambda: read(theirs, torch.Tensor.float)}, ">= 1.2", longer=3)


def clip_cid_steps(args, *flags):
    """{"clip", "clip_cid"}: training steps, teacher of width 1280, k = 10,000, as for CC3M."""
    step = partial(our_step, args, clip_cid, "--preset=vit_b32", "--data=cc3m", *flags)
    k, width = 10_000, 1280
    teaching = *torch.randn(2, args.batch, width), torch.randint(k, (args.batch,))
    others = clip_cid.teaching_inputs(teaching, 0, 0, args.device)
    centroids = clip_cid.unit(torch.randn(k, width))
    return {"clip": step("--method=clip")[0],
            "clip_cid": step(others=others, centroids=centroids, teacher_logit_scale=4.6)[0]}


def clip_cid_step(args):
    """What cluster and instance discrimination cost."""
    compare(args, "step, B/32, k = 10,000", clip_cid_steps(args), "<= 1.1")


def blip(args):
    """A captioning step and beam search of BLIP base against transformers', same weights; small against base."""
    import transformers
    text = dict(label_smoothing=0.1, num_attention_heads=12)
    config = transformers.BlipConfig(text_config=text, vision_config=dict(image_size=224, layer_norm_eps=1e-6))
    theirs = transformers.BlipForConditionalGeneration(config).to(args.device)
    file = common.Checkpoint(Path("blip"), theirs.state_dict(), {}, None)
    ours = dlip.load_blip(file).to(args.device)
    image, ids = pairs(args)[0], captions(args)

    def our_step_of(model):
        return plain_step(model, lambda: dlip.lm_loss(model.decode(ids, model.encode_image(image)), ids))

    step = our_step_of(ours)
    their_step = plain_step(theirs, lambda: theirs(image, ids, labels=ids).loss)
    compare(args, "captioning step, BLIP base, fp32", {"dlip.py": step, "transformers": their_step}, ">= 1.0",
            tolerance=1e-3)
    ours.eval(), theirs.eval()
    small = dlip.BLIP(dlip.BLIPSize(dlip.VIT["small"], dlip.BERT["small"])).to(args.device).eval()
    amp, _ = common.mixed_precision("auto", args.device)
    encode = torch.inference_mode()(amp(dlip.encode_pair))
    compare(args, "inference, image and text",
            {"small + small": partial(encode, small, image, ids), "base + base": partial(encode, ours, image, ids)},
            ">= 2.7", longer=3)
    with torch.inference_mode():
        states = ours.encode_image(torch.randn(16, 3, 224, 224, device=args.device))
        settings = dict(num_beams=3, min_length=20, max_length=20)
        start = ids.new_full((16, 1), 30522)
        generate = partial(theirs.text_decoder.generate, start, encoder_hidden_states=states, eos_token_id=102,
                           **settings)
        compare(args, "beam search, 16 x 3 beams, 20 tokens",
                {"dlip.py": partial(ours.generate, states, **settings), "transformers": generate}, ">= 1.5")


def embeddings(args):
    """args.images unit vectors (n, 512), fp16 as --stage embed leaves them. In clusters; a third are near copies."""
    torch.manual_seed(0)
    n, on = args.images, {"device": args.device}
    centres = torch.randn(n // 50, 512, **on)
    x = clip_cid.unit(centres[torch.randint(len(centres), (n,), **on)] + torch.randn(n, 512, **on))
    copies = torch.randperm(n, **on)[:n // 3]
    x[copies] = clip_cid.unit(x[torch.randint(n, (len(copies),), **on)] + 0.01 * torch.randn(len(copies), 512, **on))
    return x.half()


def alone(args, title, function, *inputs):
    """CUDA: print and keep a row of one side, its time and memory."""
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed(args, function, *inputs)
    note = f"{seconds:.1f} s, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    print(title, note, flush=True)
    args.rows.append({"measured": title, "note": note})


def memory_of(function):
    """MB that a call takes above what the process holds before (Linux; elsewhere 0)."""
    status, counters = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not counters.exists():
        return 0

    def most():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024

    counters.write_text("5")  # the count starts anew
    before = most()
    function()
    return most() - before


def balance(args, eps=0.447):
    """All pairs closer than ε, their groups and the kept images, against faiss's exact range search alone."""
    x, by_share = embeddings(args), clip_cid.Config(remove=0.437)
    if x.is_cuda:
        return alone(args, f"balance, {len(x):,} x 512, --remove 0.437", clip_cid.choose, by_share, x)
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = clip_cid.unit(x).numpy()
    ours = partial(clip_cid.choose, clip_cid.Config(eps=eps), x)

    def search():
        index = faiss.IndexFlatIP(512)
        index.add(rows)
        return index.range_search(rows, 1 - eps ** 2 / 2)

    note = f"{memory_of(ours):.0f} MB above the memory before"
    compare(args, f"balance, {len(x):,} x 512", {"--eps 0.447": ours, "faiss range search": search}, ">= 1.6",
            rounds=3, note=note)
    compare(args, f"balance, {len(x):,} x 512",
            {"--eps 0.447": ours, "--remove 0.437": partial(clip_cid.choose, by_share, x)},
            "<= 1.2", rounds=3)


def clustering(args, k=1000):
    """Spherical k-means against faiss's: the time, and the mean cosine reached; ten assignments of all vectors each."""
    x = embeddings(args)
    if x.is_cuda:
        return alone(args, f"k-means, {len(x):,} x 512, k = 10,000, 20 iterations", clip_cid.kmeans, x, 10_000, 0)
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = clip_cid.unit(x).numpy()
    clip_cid.KMEANS_ITERATIONS = 9  # and a last assignment, which gives the labels
    found = {}

    def ours():
        *_, found["ours"] = clip_cid.kmeans(x, k, 0)

    def theirs():
        found["faiss"] = faiss.Kmeans(512, k, niter=10, spherical=True, max_points_per_centroid=len(rows))
        found["faiss"].train(rows)

    ours(), theirs()
    cosines, _ = found["faiss"].index.search(rows, 1)  # with the last centroids
    compare(args, f"k-means, {len(rows):,} x 512, k = {k}", {"clip_cid.py": ours, "faiss": theirs}, ">= 1.0", rounds=3,
            note=f"mean cosine {found['ours'][-1]:.5f} {cosines.mean():.5f}")


def tokenizing(args):
    """Captions of COCO -> ids."""
    import open_clip
    import transformers
    if not COCO.is_dir():
        return print(f"tokenizing: skipped, {COCO} is not there")
    content = common.read_json(COCO / "annotations/captions_train2017.json")
    texts = [caption["caption"].lower() for caption in content["annotations"]][:1000]
    theirs, ours = open_clip.SimpleTokenizer(), common.CLIPTokenizer()
    assert torch.equal(ours(texts), theirs(texts))
    note = f"{len(texts):,} captions"
    compare(args, "CLIP's tokens", {"common.py": partial(ours, texts), "open_clip": partial(theirs, texts)}, note=note)
    with tempfile.TemporaryDirectory() as folder:
        words = common.read_lines("bert_base_uncased_vocab.txt.gz")[:30522]
        Path(folder, "vocab.txt").write_text("\n".join(words), "utf-8")
        fast = transformers.BertTokenizer.from_pretrained(folder)
        how = dict(padding="max_length", truncation=True, max_length=40, return_tensors="pt")
        ours = common.BertTokenizer(40)
        compare(args, "BERT's tokens", {"common.py": partial(ours, texts), "transformers": partial(fast, texts, **how)},
                note=note)


def scoring(args):
    """COCO's 5,000 x 25,000 and ImageNet's 50,000 x 1,000 against topk on the full matrix, as CLIP_benchmark scores."""
    torch.manual_seed(0)
    images, texts = (clip_cid.unit(torch.randn(n, 512)) for n in (5000, 25000))
    owner = torch.arange(5000).repeat_interleave(5)

    def recalls():
        scores, found = texts @ images.T, []
        for k in (1, 5, 10):
            found.append((scores.topk(k).indices == owner[:, None]).any(1).float().mean())
            found.append((owner[scores.T.topk(k).indices] == torch.arange(5000)[:, None]).any(1).float().mean())
        return found

    ours = partial(common.retrieval, images, texts, owner)
    note = f"{memory_of(ours):.0f} MB, {memory_of(recalls):.0f} MB"
    compare(args, "recalls, 5,000 x 25,000", {"common.py": ours, "topk, full matrix": recalls}, note=note)
    images, classes = (clip_cid.unit(torch.randn(n, 512)) for n in (50_000, 1000))
    labels = torch.randint(1000, (50_000,))

    def accuracy():
        best = (images @ classes.T).topk(5).indices == labels[:, None]
        return best[:, 0].float().mean(), best.any(1).float().mean()

    ours = partial(common.zero_shot, images, labels, classes)
    note = f"{memory_of(ours):.0f} MB, {memory_of(accuracy):.0f} MB"
    compare(args, "zero-shot, 50,000 x 1,000", {"common.py": ours, "topk, full matrix": accuracy}, note=note)


def write_million(folder, samples, shards=100):
    """Pairs of a small JPEG and a caption in tar shards."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "JPEG")
    picture = picture.getvalue()
    for shard in range(shards):
        with tarfile.open(f"{folder}/{shard:05d}.tar", "w") as tar:
            for number in range(samples // shards):
                key = f"{shard:05d}{number:05d}"
                for name, content in ((f"{key}.jpg", picture), (f"{key}.txt", f"caption {key}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


# Run in a process of its own: opens the shards in {folder}; makes steps {start} to 20 with {workers} workers; prints
# the seconds to the first batch, MB of the process tree, a digest of the batches from step 10 on.
READER = """
import time, hashlib, os
from pathlib import Path
from types import SimpleNamespace
import torch, common
torch.set_num_threads(1)
began, digest = time.perf_counter(), hashlib.sha256()
samples = common.TrainSamples(common.TarShards({folder!r}), common.CLIPTokenizer(), 32, (0.5, 1.0), 0)
cfg = SimpleNamespace(batch_size=256, seed=0, workers={workers})
for step, (image, text, _) in enumerate(common.train_loader(samples, cfg, 20, {start}, torch.device("cpu")), {start}):
    if step == {start}:
        seconds = time.perf_counter() - began
    if step >= 10:
        digest.update(text.numpy().tobytes() + image.numpy().tobytes())
    if step == 15:
        pss = 0
        for process in Path("/proc").glob("[0-9]*/stat"):
            number, parent = process.parent.name, process.read_text().rpartition(")")[2].split()[1]
            if str(os.getpid()) in (number, parent):
                pss += int(Path("/proc", number, "smaps_rollup").read_text().split("Pss:")[1].split()[0])
print(f"{{seconds:.2f}} {{pss / 1024:.0f}} {{digest.hexdigest()[:16]}}")
"""


def million(args):
    """args.samples pairs in 100 tar shards, made here and deleted after: index, second start, memory, order."""
    with tempfile.TemporaryDirectory() as folder:
        write_million(folder, args.samples)
        seconds, shards = timed(args, common.TarShards, folder)
        index, keys = Path(folder, ".index.npz").stat().st_size, shards.keys.nbytes
        notes = [f"indexed in {seconds:.1f} s, {(index - keys) / len(shards):.1f} bytes a sample beside the keys"]
        del shards
        for workers, start in ((0, 0), (1, 0), (2, 0), (2, 10)):
            code = READER.format(folder=folder, workers=workers, start=start)
            said = subprocess.check_output([sys.executable, "-c", code], cwd=common.DATA.parent, text=True)
            first, memory, digest = said.split()
            notes.append(f"{workers} workers, from step {start}: first batch after {first} s, {memory} MB, "
                         f"batches {digest}")
        print("\n".join(notes))
        args.rows += [{"measured": f"{args.samples:,} samples in 100 tar shards", "note": note} for note in notes]


PARTS = {part.__name__: part for part in
         (clip_step, pruned_inference, eclipse_step, clip_cid_step, pretraining, blip, utilisation, reading,
          tokenizing, scoring, balance, clustering, million)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu or cuda [auto]")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 5, of smaller batches")
    parser.add_argument("--batch", type=int, help="images per step [cuda 256, cpu 8; quick: a quarter]")
    parser.add_argument("--images", type=int, default=200_000,
                        help="vectors for balance and clustering, on CUDA without faiss [200000]")
    parser.add_argument("--samples", type=int, default=1_000_000, help="pairs in the shards of million [1000000]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the measurements")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # open_clip warns that its weights are random
    common.import_torchvision()  # before open_clip, which imports it without the remedy for a CPU-only torch
    args.flops = {}
    args.device, args.rounds = common.start_device(args.device, 0), 3 if args.quick else 5
    args.batch = args.batch or (256 if args.device.type == "cuda" else 8) // (4 if args.quick else 1)
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    print(common.environment(), versions)
    print(f"batch {args.batch}, {args.rounds} rounds, thrice for inference and reading\n")
    print("measured                               first                 time  second                       time  ratio"
          "    min-max    wanted   note")
    machine = f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"
    for name in args.only:
        args.rows = []
        PARTS[name](args)
        if args.rows and not args.quick:
            common.write_json(RESULTS / f"bench-{name}-{args.device.type}.json",
                              {"environment": common.environment(), "machine": machine, "versions": versions,
                               "rows": args.rows})


if __name__ == "__main__":
    sys.exit(common.run_main(main))
