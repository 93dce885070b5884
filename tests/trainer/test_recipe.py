"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.pipeline.chain.recipe import load_chain_recipe
from capipe.trainer.losses import Correction
from capipe.trainer.policy.optimizer import rate
from capipe.trainer.recipe import Recipe, load_recipe
from capipe.trainer.recipe_file import RECIPES, bundled
from capipe.trainer.recipe_sections import OptimizerConfig

TEXT = """
model: tiny/captioner
data: {shards: a, questions: b}
rewards:
  - {kind: quiz, reader: tiny/reader}
  - {kind: length, weight: 0.1}
steps: 3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_a_recipe_is_read_with_its_overrides(recipe: Path) -> None:
    made = load_recipe(recipe, ["rollout.group=4", "rewards.1.weight=0.5", "optimizer.lr=1e-4", "steps=7"])
    assert (made.rollout.group, made.rewards[1].weight, made.optimizer.lr, made.steps) == (4, 0.5, 1e-4, 7)
    assert load_recipe(recipe).steps == 3


def test_a_critic_stands_in_for_an_images_other_captions(recipe: Path) -> None:
    alone = ["rollout.group=1", "algorithm.critic={}"]
    assert load_recipe(recipe, alone).rollout.group == 1
    length = "rewards=[{kind: length, free: 2, most: 9, normalise: true}]"
    with pytest.raises(BadInput, match="`normalise` is within an image's captions"):
        load_recipe(recipe, [*alone, length, "validation=null", "data.questions=null"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.gruop=4", r"rollout\.gruop: Extra inputs.*no such key"),
        ("rollout.group=0", r"rollout\.group: .*greater than or equal to 1 \(got 0\)"),
        ("rollout.group=1", r"rollout\.group: a single caption has no others to be compared with; .*add a critic"),
        ("rewards.0.kind=beauty", "rewards.0"),
        ("rewards.5.weight=1", "entries 0 to 1"),
        ("nonsense", "section.key=value"),
        ("steps.more=1", "steps is a value"),
        ("algorithm.loss=magic", "algorithm.loss"),
        ("rewards.1.kind=quiz", "a kind of reward is listed twice: quiz, quiz$"),
        ("trained.llm=false", "no part of the model is trained"),
        ("trained={lora: {}, vision: true}", "trained.lora is an adapter .* learns alone"),
        ("trained={lora: {}, llm: false}", "trained.lora is an adapter .* learns alone"),
        ("trained.lora.rank=0", r"trained\.lora\.rank"),
        ("dtype=float16", "dtype: "),
        ("algorithm={kl: 0.1, estimator: k1}", "k1 has no gradient on average"),
        ("algorithm={kl: 0.1, kl_in: reward, estimator: k3}", r"log p - log q .* leave algorithm\.estimator out"),
        ("algorithm.correction=sometimes", "algorithm.correction"),
        ("algorithm.correction_cap=0", r"algorithm\.correction_cap"),
        ("rewards=[]", "rewards: grpo needs at least one reward to score captions by$"),
        ("data.captions=c", r"data\.captions are for loss sft, grpo samples its own"),
        ("algorithm.loss=sft", r"sft imitates captions: add data\.captions, the folder of a `capipe annotate`$"),
        ("algorithm={loss: best_of_n, critic: {}}", r"best_of_n imitates captions, .*: leave algorithm\.critic out$"),
        (
            "algorithm={loss: best_of_n, correction: token_mask}",
            r"sampled them: leave algorithm\.correction out",
        ),
        ("algorithm={loss: best_of_n, kl: 0.1, kl_in: reward}", r"best_of_n imitates captions, .* set kl_in to loss"),
        ("rollout.refill=-1", r"rollout\.refill: .*greater than or equal to 0"),
        ("data.questions=null", "a quiz asks questions: add data.questions"),
        ("rewards=[{kind: phrases, phrases: [], patterns: []}]", r"rewards\.0\.phrases: phrases and patterns are both"),
        (
            "rewards=[{kind: phrases, patterns: ['(']}]",
            r"rewards\.0\.phrases\.patterns\.0: '\(' is no regular expression",
        ),
        ("rewards=[{kind: clip}]", r"rewards\.0\.clip\.model: Field required"),
        ("rewards=[{kind: reconstruction, model: a, features: b, samples: 0}]", r"rewards\.0\.reconstruction\.samples"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(recipe: Path, override: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        load_recipe(recipe, [override])
    assert "\n" not in str(refused.value)


def test_without_a_quiz_no_questions_are_needed(recipe: Path) -> None:
    made = load_recipe(recipe, ["data.questions=null", "rewards=[{kind: itm, model: tiny/itm}]"])
    assert made.data.questions is None and made.rewards[0].kind == "itm"


GIVEN = ["rewards=[]", "data={shards: a, captions: c}", "algorithm.loss=sft"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rewards=[{kind: length}]", "rewards"),
        ("data.questions=b", "data.questions"),
        ("rollout.refill=1", "rollout.refill"),
        ("rollout.overlap=true", "rollout.overlap"),
        ("rollout.temperature=0.7", "rollout.temperature"),
        ("algorithm.kl=0.1", "algorithm.kl"),
    ],
)
def test_given_captions_need_no_rollouts_and_no_rewards(recipe: Path, override: str, key: str) -> None:
    made = load_recipe(recipe, GIVEN)
    assert made.rewards == () and made.data.captions == "c"
    assert load_recipe(recipe, [*GIVEN, "data.prompt_name=dense"]).semantic() != made.semantic()
    with pytest.raises(BadInput, match=f"sft samples and scores nothing: leave {key} out$"):
        load_recipe(recipe, [*GIVEN, override])


def test_dynamic_sampling_is_part_of_what_a_run_is_only_where_it_is_used(recipe: Path) -> None:
    first = load_recipe(recipe).semantic()
    assert "refill" not in first["rollout"] and "captions" not in first["data"]  # as of runs from before these keys
    assert load_recipe(recipe, ["rollout.refill=0"]).semantic() == first
    assert load_recipe(recipe, ["rollout.refill=2"]).semantic() != first
    with pytest.raises(BadInput, match=r"rollout\.refill: with a critic"):
        load_recipe(recipe, ["rollout.refill=2", "algorithm={loss: ppo, critic: {}}"])


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no recipe there"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(BadInput, match="not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(BadInput, match="a mapping"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 20_000, "nested over 50 deep"),
        ("a: " + "[" * 20_000 + "]" * 20_000, "nested over 50 deep"),
        ("{a: " * 20_000 + "1" + "}" * 20_000, "nested over 50 deep"),
        ("- " * 20_000 + "1", "nested over 50 deep"),
        ("? " * 20_000 + "1", "nested over 50 deep"),
        ("\n".join(" " * depth + "a:" for depth in range(200)), "nested over 50 deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000)), "nested over 50 deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 40)), "100000 values"),
        ("a: &a [*a]", "an alias of what it lies in"),
        ("a: &a {<<: *a}", "an alias of what it lies in"),
        ("a: 2024-13-45", "not YAML: month must be in 1..12"),
        ("a: " + "9" * 6000, "not YAML: Exceeds the limit"),
        ("a: !!python/object/apply:os.system [id]", "not YAML: could not determine a constructor"),
        ("#" * (1 << 20) + "\na: 1", "no recipe: over 1 MiB"),
    ],
)
def test_a_recipe_that_is_too_much_of_something(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    reads: list[Callable[[], object]] = [lambda: load_recipe(path), lambda: load_chain_recipe(path, [])]
    for read in reads:
        with pytest.raises(BadInput, match=said) as refused:
            read()
        assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600


def test_an_override_that_is_too_deep(recipe: Path) -> None:
    for override in ("steps=" + "[" * 20_000, "a." * 20_000 + "a=1", "steps=&a [*a]", "steps=2024-13-45"):
        with pytest.raises(BadInput) as refused:
            load_recipe(recipe, [override])
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_aliases_stand_for_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TEXT + "seed: &three 3\nrollout: {group: *three}\n")
    assert load_recipe(tmp_path / "recipe.yaml").rollout.group == 3


def test_a_bundled_recipe_has_a_name_which_a_file_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = load_recipe(Path("tiny-caprl"), ["steps=3"])
    assert (made.model, made.steps) == ("tiny/captioner", 3)
    (tmp_path / "tiny-caprl").write_text(TEXT)
    assert load_recipe(Path("tiny-caprl")) == load_recipe(tmp_path / "tiny-caprl") != made
    with pytest.raises(BadInput, match=r"a bundled one: .*tiny"):
        load_recipe(Path("sub/tiny"))


def test_the_judge_of_the_run_is_not_the_reward(recipe: Path) -> None:
    recipe.write_text(TEXT + "validation: {shards: c, questions: d, reader: tiny/reader}\n")
    with pytest.raises(BadInput, match="never a reward"):
        load_recipe(recipe)


def test_a_correction_is_made_where_another_engine_or_older_weights_sample(recipe: Path) -> None:
    def correction(*overrides: str) -> Correction | None:
        return load_recipe(recipe, overrides).correction()

    assert correction() is None and correction("rollout.temperature=0.7") is None
    for sampled in ("rollout.engine=vllm", "rollout.engine=http://a", "rollout.overlap=true"):
        assert correction(sampled) == Correction("sequence_mask", 3.0)  # TRL's defaults
        assert correction(sampled, "algorithm.correction=none") is None
    assert correction("algorithm.correction=token_truncate", "algorithm.correction_cap=2") == Correction(
        "token_truncate", 2.0
    )
    assert correction("rollout.overlap=true", "rollout.temperature=0.7") is not None  # transformers reports all


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.engine=vllm"], "reports for temperature 1, not for 0.7.*or algorithm.correction to none$"),
        (
            ["rollout={engine: vllm, overlap: true, temperature: 0.7}", "algorithm.correction=none"],
            "or .* transformers$",
        ),
    ],
)
def test_log_probabilities_of_another_temperature_are_not_taken_for_those_of_sampling(
    recipe: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        load_recipe(recipe, ["rollout.temperature=0.7", *overrides])
    made = load_recipe(recipe, ["rollout={engine: vllm, temperature: 0.7}", "algorithm.correction=none"])
    assert not made.rollout.reports_logprobs  # so none are kept, and the mismatch is unknown


def test_a2c_takes_no_captions_of_older_weights_for_its_own(recipe: Path) -> None:
    a2c = ["algorithm={loss: a2c, critic: {}}", "rollout.overlap=true"]
    assert load_recipe(recipe, a2c).correction() is not None
    with pytest.raises(BadInput, match=r"a2c takes captions .* set algorithm\.correction to auto"):
        load_recipe(recipe, [*a2c, "algorithm.correction=none"])


def test_keys_added_later_leave_the_fingerprint_as_it_was(recipe: Path) -> None:
    settings = load_recipe(recipe).semantic()["algorithm"]
    assert not {"kl_in", "correction", "correction_cap"} & settings.keys()
    changed = load_recipe(recipe, ["algorithm={kl_in: reward, correction: none, correction_cap: 2}"]).semantic()
    assert {"kl_in", "correction", "correction_cap"} <= changed["algorithm"].keys()


def test_an_adapter_is_not_split(recipe: Path) -> None:
    with pytest.raises(BadInput, match=r"trained\.lora: an adapter is too small .* set parallel: replicated$"):
        load_recipe(recipe, ["trained.lora={}", "parallel=sharded"])


def test_speed_is_no_part_of_what_a_run_is(recipe: Path) -> None:
    made = load_recipe(recipe)
    assert load_recipe(recipe, ["budget=5", "gradient_checkpointing=true"]).semantic() == made.semantic()
    assert load_recipe(recipe, ["wandb=captions"]).semantic() == made.semantic()
    assert load_recipe(recipe, ["seed=5"]).semantic() != made.semantic()
    drawn = "rewards=[{kind: reconstruction, model: a, features: b%s}]"
    first, fast, other = (
        load_recipe(recipe, ["data.questions=null", drawn % more]).semantic()
        for more in ("", ", batch: 2, cache: c, device: cpu", ", samples: 4")
    )
    assert first == fast != other
    assert isinstance(made, Recipe)


@pytest.mark.parametrize("name", bundled("training").split(", "))
def test_every_recipe_that_comes_along_loads(name: str) -> None:
    assert load_recipe(Path(name)).steps > 0


def test_the_recipe_of_a_chain_is_none_of_a_training(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tiny\.yaml: this is the recipe of a chain; run it by: capipe run tiny$"):
        load_recipe(Path("tiny"))
    (tmp_path / "twice.yaml").write_text("steps: 3\nsteps: 4\n")
    with pytest.raises(BadInput, match="'steps' is written twice"):
        load_recipe(tmp_path / "twice.yaml")


def test_the_recipes_of_caprl_differ_where_its_paper_and_its_script_do() -> None:
    paper, released = (load_recipe(RECIPES / f"caprl-{name}.yaml") for name in ("paper", "released"))
    assert (paper.algorithm.baseline, released.algorithm.baseline) == ("group_std", "leave_one_out")
    assert paper.algorithm.kl > 0 == released.algorithm.kl
    for recipe in (paper, released):
        assert (recipe.rollout.images, recipe.rollout.group, recipe.rollout.max_tokens) == (128, 8, 4096)
        assert (recipe.optimizer.lr, recipe.optimizer.warmup) == (1e-6, 20)


def test_learning_rates() -> None:
    config = OptimizerConfig(lr=1.0, warmup=4, schedule="linear")
    assert [rate(config, step, 8) for step in range(9)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0])
    cosine = OptimizerConfig(lr=2.0, warmup=0, schedule="cosine")
    assert [rate(cosine, step, 2) for step in range(3)] == pytest.approx([2, 1, 0])
    assert rate(OptimizerConfig(lr=3.0, warmup=0), 99, 100) == 3
