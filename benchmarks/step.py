"""Kernels on this GPU: each beside what it takes the place of, and a whole training step of an 8B shape, profiled.

python benchmarks/step.py micro
python benchmarks/step.py float8
python benchmarks/step.py step [--layers 32] [--batch 4] [--length 2048] [--checkpointing] [--plain] [--profile]
python benchmarks/step.py step --fp8 | --beside
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["micro", "float8", "step"])
    parser.add_argument("--fp8", action="store_true", help="frozen products in float8")
    parser.add_argument("--beside", action="store_true", help="the same steps in 16 bits and then in float8")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--host", action="store_true", help="profile what the host does")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--stash", action="store_true", help="block inputs wait on the host")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=["MLPs", "linear layers", "norms", "rotary positions"])
    parser.add_argument("--set", nargs="*", default=[], help="constants of kernels, as narrow.LINES=16")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for setting in options.set:
        name, _, value = setting.partition("=")
        module, _, constant = name.partition(".")
        setattr(importlib.import_module(f"qft.kernels.{module}"), constant, int(value))
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), flush=True)
    options.kinds += ["products in float8"] if options.fp8 else []
    {"micro": micro, "float8": in_float8}.get(options.what, functools.partial(step, options))()


def timed(run: Callable[[], Any], repeat: int = 80) -> float:
    """Milliseconds, the median."""
    from triton.testing import do_bench

    return round(float(do_bench(run, warmup=repeat // 4, rep=repeat, return_mode="median")), 4)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def told(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def micro() -> None:
    from qft.kernels import activation, dequantize, norm

    rows = 8192
    for shape in ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)):
        weight = random(*shape) * 0.02
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        out = torch.empty(shape[0], shape[1] + 64, device="cuda", dtype=torch.bfloat16)[:, : shape[1]]
        wanted = bnb.functional.dequantize_4bit(packed, state)
        found = {"bnb": timed(functools.partial(bnb.functional.dequantize_4bit, packed, state))}
        for size in (1024, 4096):
            for warps in (2, 4):
                if size // 2 < warps * 32 * 2 or (shape[1] < size):
                    continue
                out.fill_(float("nan"))
                dequantize.dequantize_into([(packed, state)], out, size, warps)
                same = torch.equal(out, wanted)
                name = f"{size}/{warps}" + ("" if same else " WRONG")
                found[name] = timed(functools.partial(dequantize.dequantize_into, [(packed, state)], out, size, warps))
        best = dict(sorted(found.items(), key=lambda item: item[1])[:4])
        told(dequantize=shape, bnb=found["bnb"], best=best, wrong=[n for n in found if "WRONG" in n])
    both, dh = random(rows, 2 * 14336 + 64)[:, : 2 * 14336], random(rows, 14336)
    told(
        act=timed(lambda: activation.activate(both, "silu", 64)),
        copy_T4096=timed(lambda: dh[:, :4096].clone()),
        copy_T14336=timed(lambda: dh.clone()),
    )
    told(act_back=timed(lambda: activation.activate_back(both, dh, "silu")))
    extended(rows)
    x, w, g = random(rows, 4096), random(4096), random(rows, 4096)
    _, scales = norm.normed(x, w, 1e-5, 0.0, torch.bfloat16, 64)
    told(
        norm=timed(lambda: norm.normed(x, w, 1e-5, 0.0, torch.bfloat16, 64)),
        norm_back=timed(lambda: norm.normed_back(g, x, w, scales, 0.0, trained=False)),
        norm_back_trained=timed(lambda: norm.normed_back(g, x, w, scales, 0.0, trained=True)),
    )
    products(x)


def in_float8() -> None:
    summed(8192, 14336)
    for shape in ((28672, 4096), (4096, 14336), (4096, 28672), (4096, 4096), (1024, 4096)):
        pieces_in_float8(8192, shape)


def summed(rows: int, columns: int) -> None:
    """What adapters add, by the kernels of the activation and by one of its own."""
    from qft.kernels import activation, float8

    both, dh = random(rows, 2 * columns), random(rows, columns)
    whole = float8.Added(random(rows, 64), random(2 * columns, 64).t(), 32)
    added = float8.Added(whole.x, whole.narrow, 32, 16)
    back = float8.Added(random(rows, 64), random(64, columns), 16)
    ways = [(lines, size, warps) for lines in (16, 32) for size in (64, 128, 256) for warps in (4, 8)]
    before, found = dict(activation.TILE), {}
    for lines, size, warps in ways:
        activation.TILE.update(LINES=lines, SIZE=size, num_warps=warps)
        forth = timed(lambda: activation.activate(both, "silu", 64, added), 30)
        found[f"{lines}/{size}/{warps}"] = (
            forth,
            timed(lambda: activation.activate_back(both, dh, "silu", added, back), 30),
        )
    activation.TILE.update(before)
    told(
        added=timed(lambda: added.to(both)), activate=timed(lambda: activation.activate(both, "silu", 64)),
        not_by_halves=timed(lambda: activation.activate(both, "silu", 64, whole)),
        not_lacking=timed(lambda: activation.activate_back(both, dh, "silu", None, back)),
        added_back=timed(lambda: back.to(dh)), activate_back=timed(lambda: activation.activate_back(both, dh, "silu")),
        best=dict(sorted(found.items(), key=lambda item: item[1][0])[:4]),
        best_back=dict(sorted(found.items(), key=lambda item: item[1][1])[:4]),
    )  # fmt: skip


def pieces_in_float8(rows: int, shape: tuple[int, int]) -> None:
    """What a product in float8 takes, piece by piece, beside one in 16 bits."""
    from qft.kernels import float8, rounding

    weight = random(*shape) * 0.02
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    straight, turned = (torch.empty(*s, device="cuda", dtype=float8.E4M3) for s in (shape, shape[::-1]))
    factor = float8.Factor(float(float8.power_for(float8.largest(packed, state))))
    x, right, border = random(rows, shape[1]), random(shape[0], 64), random(rows, 64)
    ones, one = torch.ones(1, shape[0], device="cuda"), torch.ones((), device="cuda")
    made = rounding.rounded(x, factor)
    most = (x.abs().amax(1).float().view(torch.int32)).contiguous()
    float8.write([(packed, state)], straight, factor.weight, turned=False)
    out = float8.multiply(made, straight, torch.bfloat16)
    wanted = x.float() @ bnb.functional.dequantize_4bit(packed, state).float().t()
    mm = functools.partial(torch._scaled_mm, made.numbers, straight.t(), out_dtype=torch.bfloat16)
    told(
        float8=shape, error=round(float((out.float() - wanted).norm() / wanted.norm()), 4),
        in_16_bits=timed(lambda: torch.mm(x, weight.t())),
        by_rows=timed(lambda: mm(scale_a=made.scales, scale_b=ones, use_fast_accum=True)),
        by_rows_slow=timed(lambda: mm(scale_a=made.scales, scale_b=ones, use_fast_accum=False)),
        by_tensor=timed(lambda: mm(scale_a=one, scale_b=one, use_fast_accum=True)),
        by_tensor_slow=timed(lambda: mm(scale_a=one, scale_b=one, use_fast_accum=False)),
        rounding=timed(lambda: rounding.rounded(x, factor)),
        rounding_known=timed(lambda: rounding.rounded(x, factor, most)),
        straight=timed(lambda: float8.write([(packed, state)], straight, factor.weight, turned=False)),
        turned=timed(lambda: float8.write([(packed, state)], turned, factor.weight, turned=True)),
        add=timed(lambda: float8.Added(border, right.t(), 16).to(out)),
        add_by_torch=timed(lambda: out.addmm_(border, right.t())),
    )  # fmt: skip


def extended(rows: int) -> None:
    """A copy with a border, of which that product is; and the product alone, behind what has a border."""
    from qft.kernels import narrow

    for columns, rank, copies in ((4096, 16, True), (4096, 16, False), (4096, 48, False), (28672, 32, False)):
        out = random(rows, columns + 64)
        x = random(rows, columns) if copies else out[:, :columns]
        inner = random(rows, rank)
        for name, n in (("A", random(64, columns + 64)[:rank, :columns].t()), ("B", random(columns, 4160)[:, :rank])):
            run = functools.partial(narrow.extend, x, out, n, columns, fill=64, inner=inner)
            names = ("LINES", "SIZE", "WARPS", "STAGES")
            shapes = ((16, 128, 4), (16, 256, 4), (16, 512, 4), (16, 512, 8), (32, 128, 4), (32, 256, 4), (32, 512, 8))
            ways = [(*shape, stages) for shape in shapes for stages in (1, 3)]
            told(extend=(columns, rank, copies, name), **tuned(narrow, names, ways, run))


def tuned(module: Any, names: Sequence[str], ways: Iterable[Sequence[int]], run: Callable[[], Any]) -> dict[str, Any]:
    """The best settings of a kernel."""
    found: dict[str, float] = {}
    before = {name: getattr(module, name) for name in names}
    for way in ways:
        for name, value in zip(names, way, strict=True):
            setattr(module, name, value)
        try:
            found["/".join(map(str, way))] = timed(run, 30)
        except Exception as error:
            found["/".join(map(str, way)) + f" {type(error).__name__}"] = 99.0
    for name, value in before.items():
        setattr(module, name, value)
    return dict(sorted(found.items(), key=lambda item: item[1])[:4])


def products(x: torch.Tensor) -> None:
    """Narrow products, as they come up in the border."""
    rows = len(x)
    for columns in (4096, 14336, 28672):
        g, inner = random(rows, columns + 64)[:, :columns], random(rows, 64)
        a, b = random(64, columns + 64)[:, :columns], random(columns, 4160)[:, 4096:]
        told(
            columns=columns,
            x_at=timed(functools.partial(torch.mm, g, a.t())),
            g_b=timed(functools.partial(torch.mm, g, b)),
            db16=timed(functools.partial(torch.mm, g.t(), inner[:, :16], out_dtype=torch.float32)),
            db64=timed(functools.partial(torch.mm, g.t(), inner, out_dtype=torch.float32)),
            da48=timed(functools.partial(torch.mm, inner[:, :48].t(), g, out_dtype=torch.float32)),
            da16=timed(functools.partial(torch.mm, inner[:, :16].t(), g, out_dtype=torch.float32)),
            read=timed(g.sum),
        )


def model_8b(options: argparse.Namespace) -> Any:
    """Random, its linear layers in nf4, with LoRA on all of them."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=options.hidden, intermediate_size=options.inner,
        num_hidden_layers=options.layers, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            rows, columns = module.weight.shape
            layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, device="meta")
            weight = random(rows, columns) * 0.02
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            layer.weight = layer.weight.to("cuda") if not layer.weight.bnb_quantized else layer.weight
            if not layer.weight.bnb_quantized:
                layer.weight = layer.weight._quantize(torch.device("cuda"))
            model.set_submodule(name, layer)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.ones(parameter.shape, device="cuda", dtype=torch.bfloat16)
                value = value if parameter.ndim == 1 else value.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).cuda()
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()


@contextmanager
def attention_of_cudnn() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        yield


def step(options: argparse.Namespace) -> None:
    from peft.helpers import disable_input_dtype_casting

    from qft.kernels import apply
    from qft.memory.chunked_loss import LOGITS
    from qft.memory.fused_loss import COUNTS, fuse_loss
    from qft.memory.stash import stash_inputs

    started = time.perf_counter()
    model = model_8b(options)
    base = model.get_base_model()
    told(fused_loss=fuse_loss(base, LOGITS))
    torch.cuda.synchronize()
    told(made_s=round(time.perf_counter() - started, 1), held_gib=round(torch.cuda.memory_allocated() / 2**30, 2))
    if not options.plain:
        started = time.perf_counter()
        applied = apply(model, base.model.layers, options.kinds, torch.bfloat16)
        told(fused=applied.fused, plain=applied.plain, seconds=round(time.perf_counter() - started, 1))
    if options.stash:
        stash_inputs(model, torch.device("cuda"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    shape = (options.batch, options.length)
    counts = (options.length - 1,) * options.batch
    batches = [torch.randint(5, 49000, shape, device="cuda") for _ in range(options.steps)]

    def one(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False, **{COUNTS: counts}).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with disable_input_dtype_casting(model, active=True), attention_of_cudnn():
        told(**timed_steps(one, batches))
        if options.beside:
            applied.in_float8(on=True)
            told(fused=applied.fused, plain=applied.plain)
            told(**timed_steps(one, batches))
        if options.host:
            of_the_host(lambda: one(batches[-1]))
        if options.profile:
            profiled(lambda: one(batches[-1]))


def timed_steps(one: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor]) -> dict[str, Any]:
    losses, times = [], []
    for ids in batches:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        losses.append(one(ids))
        launched = time.perf_counter()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun, launched - begun))
        if len(times) == 2:
            torch.cuda.reset_peak_memory_stats()
    best = sorted(times[2:])[len(times[2:]) // 2]
    return {
        "step_ms": round(best[0] * 1e3, 1),
        "launch_ms": round(best[1] * 1e3, 1),
        "times_ms": [round(time * 1e3) for time, _ in times[2:]],
        "tok_s": round(batches[0].numel() / best[0]),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(float(x), 3) for x in losses],
    }


def of_the_host(run: Callable[[], Any]) -> None:
    """Functions by their own time, of which the profiler doubles most."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        run()
        torch.cuda.synchronize()
        profiler.runcall(run)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def profiled(run: Callable[[], Any]) -> None:
    """Kernels by time, and how long the GPU waits between them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = sorted(
        (e for e in profiler.events() if e.device_type.name == "CUDA"),
        key=lambda e: e.time_range.start,
    )
    total: dict[str, list[float]] = {}
    end, idle = None, 0.0
    for event in events:
        total.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
        idle += max(0.0, event.time_range.start - end) if end is not None else 0.0
        end = max(event.time_range.end, end or 0.0)
    busy = sum(map(sum, total.values()))
    told(busy_ms=round(busy / 1e3, 1), idle_ms=round(idle / 1e3, 1), launches=sum(map(len, total.values())))
    for name, spent in sorted(total.items(), key=lambda item: -sum(item[1]))[:45]:
        print(f"{sum(spent) / 1e3:8.2f} ms {len(spent):6d} x {sum(spent) / len(spent):8.1f} us  {name[:110]}")


if __name__ == "__main__":
    main()
