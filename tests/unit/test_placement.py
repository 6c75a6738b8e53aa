"""`vaopd up --gpus auto`: which cards each process gets, by given memories; figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from vaopd.config import load_config
from vaopd.errors import ConfigError
from vaopd.launch.cards import Card, assume_cards, parse_cards
from vaopd.launch.placement import Demand, place, place_run
from vaopd.vlm.memory import GIB, MODELS, Model, find_model

ROOT = Path(__file__).parents[2]
H100 = 79.1


def demand(teacher: str = "8b", *overrides: str, with_teacher: bool = True) -> Demand:
    config = load_config(ROOT / "configs" / f"geometry3k-{teacher}.toml", overrides)
    return Demand.of(config, overrides, with_teacher=with_teacher)


def cards(count: int, gib: float = H100) -> list[Card]:
    return [Card(index=index, gib=gib) for index in range(count)]


@pytest.mark.parametrize(("count", "teacher", "expected"), [
    (2, "8b", {"teacher": ("0",), "rollout": ("0",), "trainer": ("1",)}),
    (2, "32b", {"teacher": ("0",), "rollout": ("1",), "trainer": ("1",)}),
    (3, "8b", {"teacher": ("0",), "rollout": ("1",), "trainer": ("2",)}),
    (4, "8b", {"teacher": ("0",), "rollout": ("1",), "trainer": ("2,3",)}),
    (3, "32b", {"teacher": ("0",), "rollout": ("1",), "trainer": ("2",)}),
    (4, "32b", {"teacher": ("0,1",), "rollout": ("2",), "trainer": ("3",)}),
    (7, "8b", {"teacher": ("0", "1"), "rollout": ("2", "3", "4"), "trainer": ("5,6",)}),
    (7, "32b", {"teacher": ("0,1",), "rollout": ("2", "3", "4"), "trainer": ("5,6",)}),
    (8, "32b", {"teacher": ("0,1", "2,3"), "rollout": ("4", "5"), "trainer": ("6,7",)}),
    (8, "8b", {"teacher": ("0", "1"), "rollout": ("2", "3"), "trainer": ("4,5,6,7",)}),
])  # fmt: skip
def test_cards_of_80_gb(count: int, teacher: str, expected: dict[str, tuple[str, ...]]) -> None:
    """On two cards the worker goes where more room is left: beside an 8B teacher, but not beside one of 32B.

    The recipes' 32B has two cards wherever two more are left, and every teacher a replica where four more are.
    """
    assert place(cards(count), demand(teacher)).gpus == expected


def test_a_teacher_has_as_many_cards_as_hold_it_split() -> None:
    """32B: 58.1 GiB of its layers are split and 4.0 are on each card, with 4.7 or less for a forward."""
    chosen = place(cards(4, 48), demand("32b", "data.max_pixels=262144", "teacher.processes=1"))
    assert chosen.gpus == {"teacher": ("0,1",), "rollout": ("2",), "trainer": ("3",)}
    assert "teacher.processes=2" in chosen.overrides
    assert "on card 0,1: Qwen/Qwen3-VL-32B-Instruct needs 36.5 GiB of each, its layers split" in chosen.reasons[0]
    assert "teacher.processes=1" in place(cards(2), demand("32b")).overrides  # as the recipe has 2


def test_two_cards_are_not_taken_from_a_trainer_that_needs_them() -> None:
    """A 4B student needs 79.3 GiB whole, so two ranks, and a worker: one card is left for the teacher."""
    chosen = place(cards(4), demand("32b", "student.model=Qwen/Qwen3-VL-4B-Instruct"))
    assert chosen.gpus == {"teacher": ("0",), "rollout": ("1",), "trainer": ("2,3",)}


@pytest.mark.parametrize(("count", "gib", "teacher", "remedy"), [
    (1, H100, "8b", r"\. It fits with --set trainer\.optimizer=adamw_8bit$"),
    (4, 48, "32b", r"\. It fits with --set data\.max_pixels=1048576$"),
    (2, 23.6, "4b", r"\. It fits with --set student\.lora\.rank=32 --set trainer\.learning_rate=1e-5$"),
    (2, 23.99, "8b", r"rank=32 --set trainer\.learning_rate=1e-5 .*1048576 --set trainer\.forward_tokens=8192$"),
    (2, 23.99, "8b-lora", r"\. It fits with --set data\.max_pixels=1048576 --set trainer\.forward_tokens=8192$"),
    (1, 23.6, "4b", "the worker finds|a trainer rank of"),
])  # fmt: skip
def test_settings_with_which_a_recipe_fits_are_named(count: int, gib: float, teacher: str, remedy: str) -> None:
    recipe = ROOT / "configs" / f"geometry3k-{teacher}.toml"
    with pytest.raises(ConfigError, match=remedy) as refused:
        place_run(cards(count, gib), recipe)
    if "It fits" in str(refused.value):
        settings = str(refused.value).partition(" fits with --set ")[2].split(" --set ")
        assert place_run(cards(count, gib), recipe, settings).gpus


def test_moments_of_8_bits_are_never_sharded() -> None:
    with pytest.raises(ConfigError, match="a trainer rank of"):
        place(cards(4, 23.6), demand("8b", "trainer.optimizer=adamw_8bit"))


def test_the_settings_that_belong_to_a_choice() -> None:
    """8B: weights 16.3 GiB and a forward of 2.9 leave 54.3 of 73.6 GiB: vLLM gets 65 % of the 79.1."""
    assert place(cards(2), demand()).overrides == ("rollout.engine_options.gpu_memory_utilization=0.65",)
    assert place(cards(8), demand()).overrides == ("rollout.workers=2", "trainer.processes=4")


def test_ranks_divide_the_step_s_prompt_groups() -> None:
    chosen = place(cards(6), demand("8b", "trainer.prompts_per_step=6"))
    assert chosen.gpus == {
        "teacher": ("0", "1"),
        "rollout": ("2", "3"),
        "trainer": ("4,5",),
    }  # four ranks would not share six groups equally


def test_a_student_that_no_card_holds_whole_is_sharded() -> None:
    """8B: 18 bytes for each of 8.77e9 weights exceed a card; a fourth of 16 are 32.7 GiB, before what is gathered."""
    chosen = place(cards(8), demand("8b", "student.model=Qwen/Qwen3-VL-8B-Instruct"))
    assert chosen.gpus == {"teacher": ("0", "1"), "rollout": ("2", "3"), "trainer": ("4,5,6,7",)}
    assert "trainer.sharding.kind=full" in chosen.overrides
    assert "the student sharded: 49.5 GiB" in chosen.reasons[-1]
    with pytest.raises(ConfigError, match=r"needs 1\d\d\.\d GiB for its shortest forward, and"):
        place(cards(8), demand("8b", "student.model=Qwen/Qwen3-VL-8B-Instruct", "trainer.sharding.kind=none"))


def test_no_forward_of_a_sharded_student_runs_out_of_memory() -> None:
    """It couldn't begin again. 8B, images only: 0.904 MB a token, 0.747 for its four patches: 15 622 in 24.0 GiB."""
    sharded = demand("8b", "student.model=Qwen/Qwen3-VL-8B-Instruct")
    assert place(cards(8), sharded).overrides[-1] == "trainer.forward_tokens=15622"
    assert not any("forward_tokens" in setting for setting in place(cards(8, 139), sharded).overrides)
    assert not any("forward_tokens" in setting for setting in place(cards(8), demand()).overrides)


def test_a_teacher_elsewhere_needs_no_card() -> None:
    chosen = place(cards(2), demand(with_teacher=False))
    assert chosen.gpus == {"rollout": ("0",), "trainer": ("1",)}
    assert not any("teacher on card" in reason for reason in chosen.reasons)


def test_a_teacher_on_the_student_s_own_weights_needs_no_card() -> None:
    """Nor a head of its own: the adapters' student needs as much as with a teacher elsewhere, less 0.6 GiB of head."""
    lora = ["student.lora.rank=16", "student.lora.start=ANY"]
    shared = ["teacher.shared_base=true", "teacher.model=Qwen/Qwen3-VL-2B-Instruct"]
    own, elsewhere = demand("8b", *lora, *shared), demand("8b", *lora, *shared[1:], with_teacher=False)
    assert place(cards(2), own).gpus == {"rollout": ("0",), "trainer": ("1",)}
    head = find_model("Qwen/Qwen3-VL-2B-Instruct").head_parameters
    difference = elsewhere.count_trainer_bytes(1, sharded=False) - own.count_trainer_bytes(1, sharded=False)
    assert difference == 2 * head


def test_everything_on_one_card_if_it_fits() -> None:
    tiny = load_config(ROOT / "configs" / "tiny.toml", ["teacher.device_map=auto"])
    chosen = place(cards(1, 24), Demand.of(tiny, with_teacher=True))
    assert chosen.gpus == {"teacher": ("0",), "rollout": ("0",), "trainer": ("0",)}
    on_cpu = Demand.of(load_config(ROOT / "configs" / "tiny.toml"), with_teacher=True)
    assert place(cards(2, 24), on_cpu).gpus == {"rollout": ("0",), "trainer": ("1",)}  # by its teacher.device_map
    with pytest.raises(ConfigError, match=r"don't fit on 73\.6 GiB: the worker finds \d+\.\d; add a card"):
        place(cards(1), demand())


@pytest.mark.parametrize(("count", "gib", "teacher", "overrides", "message"), [
    (0, H100, "8b", [], "shows no NVIDIA card"),
    (1, 48, "32b", [], r"teacher Qwen/Qwen3-VL-32B-Instruct needs 66\.9 GiB, of which 44\.6 are usable"),
    (2, 24, "32b", [], r"needs 36\.5 GiB on each of 2 cards, of which 22\.3 are usable"),
    # 16 bytes for each of 33.4e9 weights are 124.3 GiB on each of four ranks, before what they gather.
    (8, H100, "8b", ["student.model=Qwen/Qwen3-VL-32B-Instruct"],
     r"rank of \S+32B\S+ needs 1\d\d\.\d GiB .* sharded over 4 ranks, .* 73\.6 GiB"),
    (4, H100, "8b", ["trainer.processes=4"], "5 cards are asked for by trainer.processes, .* and 3 of 4 are left"),
])  # fmt: skip
def test_what_does_not_fit_is_named_with_its_figures(
    count: int, gib: float, teacher: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        place(cards(count, gib), demand(teacher, *overrides))


def test_numbers_that_are_set_by_hand_are_the_choice_s() -> None:
    """Two ranks leave four of six cards to workers; three workers leave three, of which two ranks share 16 groups."""
    ranks = place(cards(8), demand("8b", "trainer.processes=2"))
    assert (ranks.gpus["rollout"], ranks.gpus["trainer"]) == (("2", "3", "4", "5"), ("6,7",))
    assert ranks.overrides == ("rollout.workers=4",)
    workers = place(cards(8), demand("8b", "rollout.workers=3"))
    assert (workers.gpus["rollout"], workers.gpus["trainer"]) == (("2", "3", "4"), ("6,7",))
    assert workers.reasons[-1] == "card 5 stays idle"


def test_a_worker_has_as_many_cards_as_hold_it() -> None:
    """32B: 62.1 GiB of weights, 4 of vLLM's and 3 of keys exceed 85 % of 79.1 GiB; a half of them doesn't."""
    large = ["student.model=Qwen/Qwen3-VL-32B-Instruct", "student.lora.rank=32"]
    chosen = place(cards(8), demand("8b", *large))
    assert (chosen.gpus["rollout"], chosen.gpus["trainer"]) == (("2,3",), ("4,5,6,7",))
    assert "rollout.engine_options.tensor_parallel_size=2" in chosen.overrides
    configured = place(cards(8), demand("8b", "rollout.engine_options.tensor_parallel_size=2"))
    assert configured.gpus["rollout"] == ("2,3",)
    assert not any("tensor_parallel" in setting for setting in configured.overrides)


def test_of_unequal_cards_the_teacher_has_the_smallest_and_the_trainer_the_largest() -> None:
    """8B: 19.6 GiB are less than 93 % of 23.6; a trainer of a 2B needs 40.3 before any group."""
    assert assume_cards("1x79.1,2x23.6") == [
        Card(index=i, gib=g, name="assumed") for i, g in enumerate((79.1, 23.6, 23.6))
    ]
    chosen = place(assume_cards("2x79.1,2x23.6"), demand())
    assert chosen.gpus == {"teacher": ("2",), "rollout": ("3",), "trainer": ("0,1",)}
    assert place(assume_cards("1,1x23.6"), demand()).gpus == {"teacher": ("1",), "rollout": ("0",), "trainer": ("0",)}
    for text in ("2xnan", "-1x80", "8x", "2x0", "x80", ""):
        with pytest.raises(ConfigError, match="is not NUMBER or NUMBERxGIB"):
            assume_cards(text)


def test_float32_takes_twice_the_memory_of_bfloat16() -> None:
    """But the sums of the log-softmax: 8 bytes for each of 1024 · 151 936 logits; the student's master weights, too."""
    short, long = demand(), demand("8b", "teacher.dtype=float32", "student.dtype=float32")
    logits = 8 * 1024 * 151_936
    assert long.count_teacher_bytes(1) == 2 * (short.count_teacher_bytes(1) - logits) + logits
    student, head = MODELS["2B"].parameters, MODELS["8B"].head_parameters
    more = long.count_trainer_bytes(1, sharded=False) - short.count_trainer_bytes(1, sharded=False)
    assert more == 2 * head + 4 * 1024 * 151_936 - 2 * student  # no copies for autocast


def test_the_flags_say_the_same_by_hand() -> None:
    assert place(cards(4), demand()).flags == (
        "--gpus teacher=0 --gpus rollout=1 --gpus trainer=2,3 --set trainer.processes=2"
    )


def test_cards_are_read_from_nvidia_smi_and_narrowed_by_the_environment() -> None:
    text = "\n".join(f"{index}, 81559, NVIDIA H100 80GB HBM3, 580.159.04" for index in range(4))
    assert [card.index for card in parse_cards(text, visible=None)] == [0, 1, 2, 3]
    assert [card.index for card in parse_cards(text, visible="3,1")] == [3, 1]
    assert parse_cards(text, visible="") == []
    card = parse_cards(text, visible="2")[0]
    assert (card.gib, card.driver) == (81559 / 1024, "580.159.04")
    with pytest.raises(ConfigError, match="names 'GPU-1f', not a number"):
        parse_cards(text, visible="GPU-1f")
    assert parse_cards("0, [N/A], NVIDIA Thor, 580.1", visible=None) == []


def test_sizes_are_read_from_a_folder_and_known_for_the_published_models(tmp_path: Path) -> None:
    assert find_model("Qwen/Qwen3-VL-8B-Instruct") is MODELS["8B"]
    tiny = find_model(str(ROOT / "models" / "tiny-student"))
    assert isinstance(tiny, Model)
    assert 2 * tiny.parameters < GIB / 100
    with pytest.raises(ConfigError, match=r"no config\.json of it here; download the model, or place"):
        find_model("nobody/unknown-model")
    (tmp_path / "config.json").write_text('{"text_config": {}, "vision_config": {}}')
    with pytest.raises(ConfigError, match=r"not Qwen3-VL's \('hidden_size' is missing\); place the processes"):
        find_model(str(tmp_path))
