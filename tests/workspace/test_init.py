"""init: a workspace that parses, filled in as asked, and never over anybody's files."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome
from stages.paper.reported import accuracies
from stages.workspace.init import DEMOS, TEMPLATES, init
from stages.workspace.machine import Machine
from stages.workspace.paths import Workspace


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_template_is_a_workspace_whose_settings_hold(template: str, tmp_path: Path) -> None:
    workspace = init(tmp_path / "study", template=template)
    assert workspace.agreement.federation.name == "study"
    assert workspace.agreement == Workspace.find(tmp_path / "study" / "tasks").agreement
    assert workspace.machine.checkpoint_steps == Machine().checkpoint_steps
    assert "@" not in (tmp_path / "study/fedcollm.toml").read_text()
    assert {"README.md", "machine.toml", "Snakefile"} <= {path.name for path in (tmp_path / "study").iterdir()}
    assert not list((tmp_path / "study").rglob("__*"))


def test_every_template_has_a_script_that_runs_and_a_task_that_evaluation_names(template: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    tasks = init(folder, template=template).agreement.evaluation.tasks
    assert (folder / "run_rounds.sh").stat().st_mode & 0o111 == 0o111
    assert tasks
    assert all((folder / "tasks" / f"{task}.yaml").exists() for task in tasks)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in DEMOS])
def test_clients_rounds_and_seed_land_in_the_agreement(
    template: str, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "study"
    asked = ["--clients", 7, "--rounds", 3, "--seed", 11]
    assert fedcollm("init", folder, "--template", template, *asked).code == 0
    federation = tomllib.loads((folder / "fedcollm.toml").read_text())["federation"]
    beside = {"method": "fedmkt"} if template == "mkt" else {"fork": {}}  # FedMKT's methods are not forked
    assert federation == {"name": "study", "clients": 7, "rounds": 3, "seed": 11} | beside


def test_the_papers_settings_differ_from_each_other_and_from_blank(tmp_path: Path) -> None:
    made = {name: init(tmp_path / name, template=name).agreement for name in TEMPLATES if name not in DEMOS}
    shapes = {(a.slm.model, a.llm.model, a.slm.lora.r, *a.slm.lora.target_modules) for a in made.values()}
    assert len(shapes) == len(made) == 5
    assert (made["s1"].slm.model, made["s1"].llm.model) == ("gpt2", "gpt2-large")
    assert (made["s2"].slm.model, made["s2"].llm.model) == ("facebook/opt-1.3b", "facebook/opt-6.7b")
    assert made["s3"].llm.model == "meta-llama/Llama-2-7b-hf"


def test_the_setting_of_fedmkt_is_its_appendix_d(tmp_path: Path) -> None:
    agreement = init(tmp_path / "study", template="mkt").agreement
    models = {k: own.slm.model for k, own in agreement.clients.items() if own.slm}
    assert tuple(models.values()) == accuracies("mkt-heterogeneous").slms
    assert agreement.llm.model == accuracies("mkt-heterogeneous").llm
    assert [own.learning_rate for own in agreement.clients.values()] == [3e-4, 3e-5, 3e-5, 3e-5]
    for lora in (agreement.llm.lora, *(agreement.of_client(k).slm.lora for k in range(1, 6))):
        assert (lora.r, lora.alpha, lora.dropout) == (8, 16, 0.05)
    own, public = agreement.client_training, agreement.distillation
    assert (own.epochs, own.batch_size, own.weight_decay, own.max_grad_norm) == (1.0, 4, 0.1, 1.0)
    assert (public.epochs, public.batch_size, public.weight_decay) == (1.0, 4, 0.1)
    assert (public.slm_max_grad_norm, public.llm_max_grad_norm, public.llm_learning_rate) == (1.0, 1.0, 3e-5)
    assert public.select == "min-ce"
    # 0.9 L_FT + 0.1 L_KD is 0.9 (L_FT + L_KD / 9).
    assert public.lambda_slm == public.lambda_llm == pytest.approx(1 / 9, abs=1e-4)
    assert agreement.data.auxiliary_share is None  # 1/(K+1): five equal parts


@pytest.mark.parametrize("clients", [1, 2, 6])
def test_there_are_as_many_models_of_clients_as_the_paper_and_the_federation_have(clients: int, tmp_path: Path) -> None:
    agreement = init(tmp_path / "study", template="mkt", clients=clients).agreement
    assert list(agreement.clients) == ["1", "2", "3", "4"][:clients]
    assert agreement.of_client(6).slm == agreement.slm


@pytest.mark.parametrize(
    ("folder", "name"), [("study 2", "study-2"), (".hidden", "hidden"), ("étude", "tude"), ("数学", "study")]
)
def test_a_folder_of_any_name_gives_a_name_that_the_agreement_takes(folder: str, name: str, tmp_path: Path) -> None:
    assert init(tmp_path / folder).agreement.federation.name == name


def test_a_workspace_is_never_made_over_another(tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    init(tmp_path / "study")
    before = (tmp_path / "study/fedcollm.toml").read_bytes()
    outcome = fedcollm("init", tmp_path / "study", "--template", "s1")
    assert outcome.code == 5
    assert "there is a workspace already" in outcome.err
    assert str(tmp_path / "study/fedcollm.toml") in outcome.err
    assert "mend  choose another folder" in outcome.err
    assert (tmp_path / "study/fedcollm.toml").read_bytes() == before


def test_a_file_that_is_there_already_is_never_replaced(tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    own = tmp_path / "README.md"
    own.write_text("mine")
    outcome = fedcollm("init", tmp_path)
    assert outcome.code == 5
    assert "README.md is there already" in outcome.err
    assert own.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_unknown_template_is_refused_naming_those_there_are(
    tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("init", tmp_path / "study", "--template", "s4")
    assert outcome.code == 2
    assert "no template 's4'" in outcome.err
    assert "demo, demo-fedmkt, blank, s1, s2, s3, mkt" in outcome.err
    assert not (tmp_path / "study").exists()


def test_tasks_that_are_asked_for_are_trained_and_scored(tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert fedcollm("init", tmp_path / "one", "--template", "s1", "--task", "openbookqa").code == 0
    agreement = Workspace(tmp_path / "one").agreement
    assert (agreement.data.tasks, agreement.evaluation.tasks) == (["openbookqa"], ["openbookqa"])
    two = init(tmp_path / "two", tasks=["arc_easy", "commonsense_qa"]).agreement
    assert two.data.tasks == two.evaluation.tasks == ["arc_easy", "commonsense_qa"]


@pytest.mark.parametrize("name", ["", "arc easy", 'arc"', "tasks/arc_easy.yaml", "-x"])
def test_what_is_no_name_of_a_task_is_refused(name: str, tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("init", tmp_path / "study", f"--task={name}")
    assert outcome.code == 2
    assert f"{name!r} is not a task's name" in outcome.err
    assert "such as --task arc_easy" in outcome.err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("template", DEMOS)
def test_a_demo_takes_no_other_tasks(template: str, tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("init", tmp_path / "study", "--template", template, "--task", "arc_easy")
    assert outcome.code == 2
    assert "the demo has tasks of its own" in outcome.err
    assert "leave --task out" in outcome.err


def test_a_task_that_nobody_knows_is_refused_and_one_of_lm_evals_is_taken(
    tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("init", tmp_path / "study", "--task", "arc_easy", "--task", "arc_hard")
    assert outcome.code == 2
    assert "lm-eval has no task named 'arc_hard'" in outcome.err
    assert "arc_" in outcome.err.partition("mend")[2]
    assert "write tasks/arc_hard.yaml and name it in fedcollm.toml" in outcome.err
    assert not (tmp_path / "study").exists()
    assert init(tmp_path / "study", tasks=["arc_easy", "piqa"]).agreement.data.tasks == ["arc_easy", "piqa"]


@pytest.mark.parametrize("place", ["inner", "private/client-1/inner"])
def test_a_workspace_is_never_made_inside_another(place: str, tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    init(tmp_path / "study")
    outcome = fedcollm("init", tmp_path / "study" / place)
    assert outcome.code == 5
    assert "inner would lie inside another workspace" in outcome.err
    assert str(tmp_path / "study/fedcollm.toml") in outcome.err
    assert "choose a folder outside of it" in outcome.err
    assert not (tmp_path / "study" / place).exists()


# --- --set


def test_settings_stand_in_the_template_whose_comments_stay(tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    words = ["distillation.lambda_slm=0.25", "client_training.proximal=0.01", 'evaluation.tasks=["arc_easy"]']
    words += ["aggregation.rule=median", "federation.rounds=9"]
    outcome = fedcollm("init", tmp_path / "study", *(part for word in words for part in ("--set", word)))
    assert outcome.code == 0, outcome.err
    init(tmp_path / "plain")
    agreement, plain = (Workspace(tmp_path / name).agreement for name in ("study", "plain"))
    assert (agreement.distillation.lambda_slm, agreement.client_training.proximal) == (0.25, 0.01)
    assert (agreement.aggregation.rule, agreement.federation.rounds) == ("median", 9)
    assert agreement.llm == plain.llm
    texts = [(tmp_path / name / "fedcollm.toml").read_text() for name in ("study", "plain")]
    comments = [[line.partition("#")[2] for line in text.splitlines() if "#" in line] for text in texts]
    assert set(comments[1]) <= set(comments[0])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("distillation.lambda_slmm=1", "distillation.lambda_slmm: unknown key; did you mean lambda_slm?"),
        ("distilation.lambda_slm=1", "distilation: unknown key; did you mean distillation?"),
        ("federation.rounds=many", "federation.rounds: Input should be a valid integer, found 'many'"),
        ("federation.seed.x=1", "there is no setting federation.seed.x"),
        ("distillation.lambda_slm=0,1", "--set distillation.lambda_slm has 2 values"),
        ("distillation.lambda_slm", "is not KEY=VALUE"),
    ],
)
def test_a_setting_that_there_is_not_is_named_and_nothing_is_made(
    word: str, message: str, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("init", tmp_path / "study", "--set", word)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "study").exists()
