"""A forward and backward on the 2B as the trainer does it, one group or packed, with checkpointing; the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable

import floor
import timing
import torch
from accelerate import Accelerator

from benchmarks.gpu import profile
from benchmarks.gpu.measure import PEAK_FLOPS, Check, free_memory, measure_peak, measure_s
from benchmarks.gpu.models import DTYPE, TEXT_TOKENS, make_weighted
from vaopd.config import TrainerConfig, load_config
from vaopd.vlm.compiled import compile_layers
from vaopd.vlm.model import Vlm
from vaopd_trainer import compose
from vaopd_trainer.student_loss import StudentLoss

# (P, R, K) -> target in ms, with checkpointing.
TARGETS_MS = {
    (650, 500, 4): 119,
    (650, 1000, 4): 199,
    (1000, 4000, 4): 771,
    (4150, 4000, 4): 1333,
} if timing.ON_GPU else {(60, 8, 4): 0}  # fmt: skip
SMALL = (650, 100, 4) if timing.ON_GPU else (60, 8, 4)
FORWARD_TOKENS = TrainerConfig(steps=1).forward_tokens if timing.ON_GPU else 2 * (60 + 4 * 8)
TARGET_GIB = 74
TEACHER_WIDTH = 4096 if timing.ON_GPU else 256


def run(check: Check) -> None:
    report_checkpointing(check)
    student = check.models.student()
    head = (0.02 * torch.randn(student.vocab_size, TEACHER_WIDTH, device=timing.DEVICE)).to(DTYPE)
    settings = TrainerConfig(steps=1, compile_layers=False)
    loss = StudentLoss(student, teacher_head=head, trainer=settings, checkpoint_activations=True)
    make_step(loss, student, SMALL)()
    optimizer = make_optimizer(loss, fused=True)
    optimizer.step()  # makes the moments, a part of the peak
    if timing.ON_GPU:
        middle = list(TARGETS_MS)[1]
        measure_group(check, student, loss, *middle, name=", layers not compiled")
        profile.report(check, "a step, layers not compiled", make_step(loss, student, middle))
        compile_student(check, student, loss)
    for shape in TARGETS_MS:
        if check.has_time("P {}, R {}, K {}".format(*shape), 8):
            measure_group(check, student, loss, *shape)
    for shape in TARGETS_MS:
        prompt, response, rollouts = shape
        groups = FORWARD_TOKENS // (prompt + rollouts * response)
        if groups > 1 and check.has_time(f"{groups} groups of P {prompt}, R {response}", 12):
            measure_group(check, student, loss, *shape, groups=groups, name=f", of {groups} in a forward")
    del optimizer
    free_memory()
    measure_optimizer(check, student, loss)
    if timing.ON_GPU and check.has_time("a step's profile", 10):
        profile.report(check, "a step, P {}, R {}, K {}".format(*middle), make_step(loss, student, middle))


def compile_student(check: Check, student: Vlm, loss: StudentLoss) -> None:
    compile_layers(student)
    start = time.perf_counter()
    make_step(loss, student, SMALL)()
    timing.synchronise()
    check.tell("first step with compiled layers", f"{time.perf_counter() - start:.0f} s")


def report_checkpointing(check: Check) -> None:
    """In the trainer's order: the student is loaded without a device, the loss is made, then accelerate moves it."""
    config = load_config(timing.ROOT / "configs" / "tiny.toml")
    tiny = Vlm.load(timing.ROOT / config.student.model, dtype="float32")
    accelerator = Accelerator(cpu=not timing.ON_GPU)
    accelerator.prepare(compose.make_loss(config, tiny, teacher_head=None, device=accelerator.device))
    on = bool(tiny.model.is_gradient_checkpointing)
    check.tell(
        "activation checkpointing in the trainer's order",
        "on" if on else "off",
        target="on, on a GPU" if timing.ON_GPU else "",
        ok=on if timing.ON_GPU else None,
    )


def make_step(loss: StudentLoss, student: Vlm, shape: tuple[int, int, int], *, groups: int = 1) -> Callable[[], None]:
    prompt, response, rollouts = shape
    weighted = [make_weighted(student, prompt, [response] * rollouts, width=TEACHER_WIDTH) for _ in range(groups)]

    def step() -> None:
        # Backward within it, as the trainer: layers that are computed again find autocast's copies of their weights.
        with torch.autocast(timing.DEVICE, torch.bfloat16, enabled=timing.ON_GPU):
            value, _ = loss(weighted)
            value.backward()

    return step


def measure_group(
    check: Check,
    student: Vlm,
    loss: StudentLoss,
    prompt: int,
    response: int,
    rollouts: int,
    *,
    groups: int = 1,
    name: str = "",
) -> None:
    """Measures a group's share of a forward and backward of so many groups."""
    name = f"P {prompt}, R {response}, K {rollouts}{name}"
    step = make_step(loss, student, (prompt, response, rollouts), groups=groups)
    loss.zero_grad(set_to_none=True)
    try:
        with measure_peak() as peak:
            step()
        seconds = measure_s(step, warm=0) / groups
    except torch.OutOfMemoryError as error:
        check.tell(name, f"out of memory: {str(error)[:90]}", target=f"≤ {TARGET_GIB} GiB", ok=False)
        loss.zero_grad(set_to_none=True)
        free_memory()
        return
    counted = floor.Model.of(student.config)
    useful = floor.count_training_flops(
        counted, "shared", prompt=prompt, image_tokens=prompt - TEXT_TOKENS, lengths=[response] * rollouts
    )
    target = TARGETS_MS[prompt, response, rollouts]
    check.tell(
        name,
        f"{1e3 * seconds:.0f} ms, {(prompt + rollouts * response) / seconds:.0f} tokens/s, "
        f"{useful / seconds / PEAK_FLOPS:.0%} of the peak useful, {peak.total_gib:.1f} GiB in all",
        target=f"≤ {target} ms, ≤ {TARGET_GIB} GiB" if timing.ON_GPU else "",
        ok=1e3 * seconds <= target and peak.total_gib <= TARGET_GIB if timing.ON_GPU else None,
        ms=1e3 * seconds,
        gib=peak.total_gib,
        useful_share=useful / seconds / PEAK_FLOPS,
    )


def make_optimizer(loss: StudentLoss, *, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(loss.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def measure_optimizer(check: Check, student: Vlm, loss: StudentLoss) -> None:
    """Clipping and AdamW over all parameters: torch's default, in one kernel, and with a gradient within the norm."""
    make_step(loss, student, SMALL)()
    gradients = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    for fused, scales in ((False, True), (True, True), (True, False)):
        optimizer = make_optimizer(loss, fused=fused)

        def step(optimizer: torch.optim.Optimizer = optimizer, scales: bool = scales) -> None:
            norm = torch.nn.utils.get_total_norm(gradients)
            float(norm)  # as the trainer, which scales only where the norm asks for it
            if scales:
                torch.nn.utils.clip_grads_with_norm_(loss.parameters(), 1.0, norm)
            optimizer.step()

        step()  # makes the moments
        with measure_peak() as peak:
            step()
        seconds = measure_s(step, warm=0)
        check.tell(
            f"{'clip' if scales else 'norm alone'} and AdamW(fused={fused})",
            f"{1e3 * seconds:.0f} ms, +{peak.extra_gib:.1f} GiB",
            target="≤ 30 ms" if fused and timing.ON_GPU else "",
            ok=seconds <= 0.030 if fused and timing.ON_GPU else None,
            ms=1e3 * seconds,
            gib=peak.extra_gib,
        )
        del optimizer, step
        free_memory()
    loss.zero_grad(set_to_none=True)
