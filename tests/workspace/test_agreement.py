"""config: strict settings, every mistake named at once, and a template that tells the truth about them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_origin

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from builders import AGREEMENT, ROOT
from stages.paper.reported import PRESETS
from stages.runtime.errors import UsageProblem
from stages.workspace.agreement import Agreement
from stages.workspace.init import init
from stages.workspace.machine import Machine
from stages.workspace.settings import Settings, parse

TEMPLATE = ROOT / "workspace_template"
KINDS: dict[str, type[Settings]] = {"fedcollm.toml": Agreement, "machine.toml": Machine}
FILES = pytest.mark.parametrize("name", KINDS)
PATH = Path("study/fedcollm.toml")

# Keys that have no default in common with the template: what init fills in, and choices that it makes for the reader.
FILLED_IN = {"federation.name", "federation.clients", "federation.rounds", "federation.seed"}
FILLED_IN |= {
    f"{role}.{key}" for role in ("slm", "llm") for key in ("model", "lora.r", "lora.alpha", "lora.target_modules")
}
CHOSEN = {"client_training.epochs", "distillation.epochs", "data.tasks", "evaluation.tasks"}


def keys_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a settings model with its default."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        elif get_origin(field.annotation) is not dict:  # whose keys are clients; the template tells of it in words
            yield prefix + name, field.get_default()


def keys_in(path: Path) -> Iterator[tuple[str, Any, bool]]:
    """Every key of a template, its value, and whether it is commented out: lines `key = value` and `# key = value`."""
    table = ""
    for line in path.read_text().splitlines():
        if heading := re.match(r"\[([\w.]+)\]", line):
            table = f"{heading[1]}."
        elif entry := re.match(r"(# )?(\w+) = (.+)", line):
            value = re.sub(r"@\w+@", "1", entry[3])  # placeholders
            yield table + entry[2], tomllib.loads(f"value = {value}")["value"], bool(entry[1])


@FILES
def test_every_setting_stands_in_the_template_and_the_template_has_no_other(name: str) -> None:
    in_template = [key for key, _, _ in keys_in(TEMPLATE / name)]
    assert sorted(in_template) == sorted(key for key, _ in keys_of(KINDS[name]))


@FILES
def test_every_key_of_the_template_is_explained(name: str) -> None:
    lines = (TEMPLATE / name).read_text().splitlines()
    bare = [line for line in lines if re.match(r"(# )?\w+ = [^#]+$", line)]
    explained = {
        "model",
        "revision",
        "dtype",
        "quantization",
        "r",
        "alpha",
        "dropout",
        "target_modules",
        "llm_max_grad_norm",
    }
    explained |= {"batch_size", "gradient_accumulation", "weight_decay", "max_length", "slm", "llm"}  # where first met
    assert {re.sub(r"^# ", "", line).split()[0] for line in bare} <= explained


@FILES
def test_a_default_in_the_template_is_the_default(name: str) -> None:
    defaults = dict(keys_of(KINDS[name]))
    for key, value, is_commented_out in keys_in(TEMPLATE / name):
        if key in FILLED_IN | CHOSEN:
            continue
        if is_commented_out:  # off, or the default that its comment names
            assert defaults[key] in (None, [], value), key
        else:
            assert value == defaults[key], key
            assert type(value) is type(defaults[key]), key


@FILES
def test_a_commented_example_is_a_value_that_the_key_may_have(name: str) -> None:
    for key, value, is_commented_out in keys_in(TEMPLATE / name):
        *tables, last = key.split(".")
        kind: Any = KINDS[name]
        for table in tables:
            kind = kind.model_fields[table].annotation
        if is_commented_out:
            field = kind.model_fields[last]
            TypeAdapter(Annotated[field.annotation, field], config=ConfigDict(strict=True)).validate_python(value)


@pytest.mark.parametrize("template", [name for name in PRESETS if name != "mkt"])
def test_a_new_workspace_has_the_defaults_wherever_init_does_not_choose(tmp_path: Path, template: str) -> None:
    workspace = init(tmp_path / "study", template=template, clients=6, rounds=7, seed=8)
    federation = workspace.agreement.federation
    assert (federation.name, federation.clients, federation.rounds, federation.seed) == ("study", 6, 7, 8)
    assert workspace.machine == Machine()
    found = tomllib.loads((tmp_path / "study" / "fedcollm.toml").read_text())
    for key, default in keys_of(Agreement):
        *tables, last = key.split(".")
        here: Any = found
        for table in tables:
            here = here[table]
        if key not in FILLED_IN | CHOSEN and last in here:
            assert here[last] == default, key


def test_the_template_of_fedmkt_says_of_each_of_its_keys_what_it_is_and_other_defaults_than_the_paper_s() -> None:
    path = TEMPLATE / "mkt" / "fedcollm.toml"
    defaults, other = dict(keys_of(Agreement)), set()
    for key, value, is_commented_out in keys_in(path):
        assert key in defaults
        if not is_commented_out and key not in FILLED_IN | CHOSEN and value != defaults[key]:
            other.add(key)
        elif is_commented_out:
            assert defaults[key] in (None, [], value), key
    assert other == {
        *("federation.method", "slm.lora.dropout", "llm.lora.dropout"),
        *(f"client_training.{key}" for key in ("batch_size", "learning_rate", "weight_decay", "max_grad_norm")),
        *(f"distillation.{key}" for key in ("batch_size", "weight_decay", "lambda_slm", "lambda_llm", "select")),
        *(f"distillation.{role}_{key}" for role in ("slm", "llm") for key in ("learning_rate", "max_grad_norm")),
    }


def test_the_template_tells_of_tables_that_are_named_after_clients() -> None:
    assert "# [clients.2.slm] " in (TEMPLATE / "fedcollm.toml").read_text()
    assert "# [models.clients] " in (TEMPLATE / "machine.toml").read_text()


# --- strictness


def refusal(text: str, kind: type[Settings] = Agreement) -> str:
    with pytest.raises(UsageProblem) as caught:
        parse(kind, text.encode(), PATH)
    assert caught.value.where == PATH
    assert caught.value.mend
    return caught.value.message


def changed(old: str, new: str) -> str:
    assert old in AGREEMENT
    return AGREEMENT.replace(old, new, 1)


def test_settings_are_read() -> None:
    agreement = parse(Agreement, AGREEMENT.encode(), PATH)
    assert (agreement.federation.clients, agreement.client_training.learning_rate) == (3, 0.01)
    assert agreement.model_of("slm") is agreement.slm
    assert agreement.model_of("llm") is agreement.llm


def test_several_mistakes_are_all_named_at_once_with_the_nearest_key() -> None:
    text = (
        changed("batch_size = 4", "batchsize = 4").replace("clients = 3", 'clients = "3"').replace('name = "tiny"', "")
    )
    text = text.replace("slm_learning_rate = 1e-2", "slm_learningrate = 1e-2\nlambda_slm = -1.0")
    message = refusal(text + "\n[client]\n")
    assert message.startswith("6 mistakes in the settings\n")
    for line in (
        "federation.name: missing",
        "federation.clients: Input should be a valid integer, found '3'",
        "client_training.batchsize: unknown key; did you mean batch_size?",
        "distillation.slm_learningrate: unknown key; did you mean slm_learning_rate?",
        "distillation.lambda_slm: Input should be greater than or equal to 0, found -1.0",
    ):
        assert f"\n  - {line}" in message
    assert "\n  - client: unknown key; did you mean clients?" in message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lambda_slm = 1.0", "federation.lambda_slm: unknown key; did you mean distillation.lambda_slm?"),
        ("precision = 'full'", "federation.precision: unknown key; did you mean evaluation.precision?"),
    ],
)
def test_a_key_in_the_wrong_table_is_answered_with_the_right_one(line: str, told: str) -> None:
    assert refusal(changed('name = "tiny"', f'name = "tiny"\n{line}')).endswith(told)


def test_a_key_that_resembles_none_is_answered_with_all_there_are() -> None:
    message = refusal(changed('name = "tiny"', 'name = "tiny"\nxyzzy = 1'))
    assert message.endswith("federation.xyzzy: unknown key; known here: name, clients, rounds, seed, method, fork")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("clients = 3", "clients = 3.0", "federation.clients"),
        ("clients = 3", "clients = true", "federation.clients"),
        ("clients = 3", "clients = 0", "federation.clients"),
        ("rounds = 2", "rounds = -1", "federation.rounds"),
        ("seed = 7", "seed = -7", "federation.seed"),
        ('name = "tiny"', 'name = "a/b"', "federation.name"),
        ('name = "tiny"', 'name = ""', "federation.name"),
        ("learning_rate = 1e-2", "learning_rate = 0.0", "client_training.learning_rate"),
        ("learning_rate = 1e-2", 'learning_rate = "1e-2"', "client_training.learning_rate"),
        ("learning_rate = 1e-2", "learning_rate = nan", "client_training.learning_rate"),
        ("learning_rate = 1e-2", "learning_rate = inf", "client_training.learning_rate"),
        ("steps = 6", "epochs = inf", "client_training.epochs"),
        ("steps = 5", "steps = 5\nlambda_llm = inf", "distillation.lambda_llm"),
        ("steps = 5", 'steps = 5\ndivergence = "both"', "distillation.divergence"),
        ("steps = 5", "steps = 5\ntemperature = 0.0", "distillation.temperature"),
        ("steps = 5", "steps = 5\nslm_max_grad_norm = -1.0", "distillation.slm_max_grad_norm"),
        ('dtype = "float32"', 'dtype = "float16"', "slm.dtype"),
        ("alpha = 8", "alpha = 8\ndropout = 1.0", "slm.lora.dropout"),
        ("alpha = 8", 'alpha = 8\ntarget_modules = "c_attn"', "slm.lora.target_modules"),
        ("[evaluation]", '[data]\nsplit = "even"\n[evaluation]', "data.split"),
        ("[evaluation]", "[data]\nauxiliary_share = 1.0\n[evaluation]", "data.auxiliary_share"),
        ('tasks = ["colours"]', "tasks = [1]", "evaluation.tasks.0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_and_never_converted(old: str, new: str, key: str) -> None:
    message = refusal(changed(old, new))
    assert message.startswith("1 mistake in the settings\n")
    assert f"\n  - {key}: " in message


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    text = changed("steps = 5", "steps = 5\ntemperature = 2")
    assert parse(Agreement, text.encode(), PATH).distillation.temperature == 2.0


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("standalone", "", "client_training.proximal is for methods that average, as fedcollm; here is standalone"),
        ("fedcollm", "[privacy]\nepsilon = 8.0\n", "client_training.proximal is not for the training of differential"),
    ],
)
def test_what_has_no_broadcast_to_stay_near_or_trains_otherwise_has_no_proximal_term(
    method: str, more: str, message: str
) -> None:
    text = changed("steps = 6", "steps = 6\nproximal = 0.01")
    parse(Agreement, text.encode(), PATH)
    assert message in refusal(text.replace("seed = 7", f'seed = 7\nmethod = "{method}"') + more)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("server_momentum = 0.9", "server_momentum is for server fedavgm; here is none"),
        ("server_learning_rate = 1.0", "server_learning_rate is for server fedavgm, fedadagrad, fedadam, fedyogi"),
        ('server = "fedadam"\nserver_momentum = 0.9', "server_momentum is for server fedavgm; here is fedadam"),
        ('server = "fedavgm"\nbeta_1 = 0.9', "beta_1 is for server fedadagrad, fedadam, fedyogi; here is fedavgm"),
        ('server = "fedadagrad"\nbeta_2 = 0.9', "beta_2 is for server fedadam, fedyogi; here is fedadagrad"),
        ('server = "fedavgm"\ntau = 0.1', "tau is for server fedadagrad, fedadam, fedyogi; here is fedavgm"),
        ('server = "fedyogi"\ncombine = "product"', "server fedyogi steps along changes of A and B, combine product"),
        ('server = "fedadam"\nbeta_1 = 1.0', "aggregation.beta_1: Input should be less than 1"),
        ('server = "fedadam"\nbeta_2 = -0.1', "aggregation.beta_2: Input should be greater than or equal to 0"),
        ('server = "fedadam"\ntau = 1e-9', "aggregation.tau: Input should be greater than or equal to 0.00000001"),
        ('server = "fedavgm"\nserver_learning_rate = 0.0', "server_learning_rate: Input should be greater than 0"),
        ('server = "adam"', "aggregation.server: Input should be 'none', 'fedavgm', 'fedadagrad', 'fedadam' or 'fed"),
    ],
)
def test_an_optimiser_of_the_server_takes_its_own_keys_alone(lines: str, message: str) -> None:
    assert message in refusal(f"{AGREEMENT}[aggregation]\n{lines}\n")


def test_an_optimiser_of_the_server_has_defaults_of_its_own() -> None:
    keys = {
        server: parse(
            Agreement, f'{AGREEMENT}[aggregation]\nserver = "{server}"\n'.encode(), PATH
        ).aggregation.server_keys
        for server in ("none", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
    }
    adam = {"server_learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001}
    assert keys == {
        "none": {},
        "fedavgm": {"server_learning_rate": 1.0, "server_momentum": 0.9},
        "fedadagrad": {"server_learning_rate": 0.01, "beta_1": 0.0, "tau": 0.001},
        "fedadam": adam,
        "fedyogi": adam,
    }


@pytest.mark.parametrize(("method", "also"), [("standalone", ""), ("fedmkt", " without aggregation.average")])
def test_a_method_that_averages_nothing_has_no_optimiser_at_the_server(method: str, also: str) -> None:
    text = changed("seed = 7", f'seed = 7\nmethod = "{method}"') + '[aggregation]\nserver = "fedadam"\n'
    assert f"aggregation.server fedadam is for methods that average, here is {method}{also}" in refusal(text)


@pytest.mark.parametrize("privacy", ["epsilon = 8.0", "noise_multiplier = 1.0"])
def test_training_under_attack_is_refused_by_name_beside_differential_privacy(privacy: str) -> None:
    attacked = AGREEMENT + "\n[client_training.adversarial]\nsteps = 2\n"
    parse(Agreement, f"{attacked}\n[privacy]\n{privacy}\n".encode(), PATH)  # without a radius there is no attack
    attacked += "radius = 0.1\n"
    assert parse(Agreement, attacked.encode(), PATH).client_training.adversarial.passes == 3
    message = refusal(f"{attacked}\n[privacy]\n{privacy}\n")
    assert "client_training.adversarial is not for the training of differential privacy: choose one" in message


@pytest.mark.parametrize("new", ["", "steps = 6\nepochs = 1.0"])
def test_a_budget_is_epochs_or_steps_and_not_both(new: str) -> None:
    assert "client_training: needs exactly one of epochs and steps" in refusal(changed("steps = 6", new))


def test_a_quorum_larger_than_the_federation_is_refused() -> None:
    assert "min_clients is larger than federation.clients" in refusal(AGREEMENT + "[aggregation]\nmin_clients = 4\n")
    parse(Agreement, (AGREEMENT + "[aggregation]\nmin_clients = 3\n").encode(), PATH)


@pytest.mark.parametrize(
    ("clients", "lines", "message"),
    [
        (4, 'rule = "krum"\noutliers = 1', "krum needs K >= 2f + 3 updates: K=4 leaves f=0, which is meaningless"),
        (6, 'rule = "krum"\noutliers = 2', "krum needs K >= 2f + 3 updates: K=6 leaves f=1 at most"),
        (9, 'rule = "krum"\noutliers = 2\nmin_clients = 6', "K=6 (min_clients) leaves f=1 at most"),
        (2, 'rule = "trimmed-mean"\noutliers = 1', "trimmed-mean needs K > 2f updates: K=2 leaves f=0, which is mean"),
        (4, 'rule = "trimmed-mean"\noutliers = 2', "trimmed-mean needs K > 2f updates: K=4 leaves f=1 at most"),
        (5, 'rule = "krum"', "rule krum needs outliers, the number f of updates that may be bad"),
        (5, 'rule = "trimmed-mean"', "rule trimmed-mean needs outliers, the number f of updates that may be bad"),
        (
            5,
            'rule = "median"\nweighting = "samples"',
            "rule median counts every client alike: weighting samples is for",
        ),
        (5, 'rule = "median"\nmode = "secure"', "rule median needs each client's update, mode secure shows their sum"),
        (5, 'rule = "krum"\noutliers = 1\nmode = "encrypted"', "rule krum needs each client's update, mode encrypted"),
        (2, 'combine = "product"\nmode = "encrypted"', "mode encrypted shows their sums: choose one"),
        (2, 'keep = 0.1\nmode = "encrypted"', "keep has each client send other numbers, mode encrypted adds the same"),
        (2, 'weighting = "samples"\nmode = "encrypted"', "weighting samples in mode encrypted needs max_examples"),
        (1, 'mode = "encrypted"', "aggregation.mode encrypted takes 2 to 256 clients, here are 1"),
        (257, 'mode = "encrypted"', "aggregation.mode encrypted takes 2 to 256 clients, here are 257"),
        (2, 'mode = "secure"', "aggregation.mode secure takes 3 to 256 clients, here are 2"),
        (
            3,
            'mode = "encrypted"\nmin_clients = 1',
            "min_clients is below 2, which mode encrypted needs of 3",
        ),
        (2, 'mode = "encrypted"\nopener = 3', "aggregation.opener = 3: there are clients 1 to 2"),
    ],
)
def test_a_rule_that_the_federation_cannot_follow_is_refused(clients: int, lines: str, message: str) -> None:
    text = changed("clients = 3", f"clients = {clients}") + f"[aggregation]\n{lines}\n"
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("clients", "lines"),
    [
        (5, 'rule = "krum"\noutliers = 1'),
        (7, 'rule = "krum"\noutliers = 2'),
        (3, 'rule = "trimmed-mean"\noutliers = 1'),
        (2, 'rule = "clipped-mean"\nweighting = "samples"'),
        (1, 'rule = "median"'),
        (2, 'mode = "encrypted"\nopener = 2\ncombine = "alternate"'),
        (3, 'mode = "encrypted"\nmin_clients = 2\nserver = "fedadam"'),
        (2, "opener = 2"),
    ],
)
def test_a_rule_with_just_enough_clients_is_taken(clients: int, lines: str) -> None:
    text = changed("clients = 3", f"clients = {clients}") + f"[aggregation]\n{lines}\n"
    parse(Agreement, text.encode(), PATH)


@pytest.mark.parametrize(
    ("method", "said"), [("fedmkt", "hides what each client tells"), ("standalone", "has nothing to hide")]
)
def test_encrypted_mode_is_for_methods_that_average(method: str, said: str) -> None:
    text = changed("seed = 7", f'seed = 7\nmethod = "{method}"') + '[aggregation]\nmode = "encrypted"\n'
    assert f"aggregation.mode encrypted {said}" in refusal(text)


def test_a_baseline_that_averages_nothing_needs_no_clients_for_its_rule() -> None:
    text = changed("seed = 7", 'seed = 7\nmethod = "standalone"') + '[aggregation]\nrule = "krum"\noutliers = 1\n'
    parse(Agreement, text.encode(), PATH)


@pytest.mark.parametrize("text", ["federation\n", "a = 1\na = 2\n", "[a]\n[a]\n"])
def test_what_is_not_toml_is_told_with_its_place(text: str) -> None:
    with pytest.raises(UsageProblem, match=r"not valid TOML: .*line \d") as caught:
        parse(Agreement, text.encode(), PATH)
    assert re.fullmatch(rf"{re.escape(str(PATH))}:\d", str(caught.value.where))
    assert str(caught.value.mend).startswith("correct that line")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Machine, 'device = "gpu"\n', "device: not written as it has to be, found 'gpu'"),
        (Machine, '[slurm]\ntime = "4h"\n', "slurm.time: not written as it has to be, found '4h'"),
        (
            Agreement,
            '[federation]\nname = "our study"\n',
            "federation.name: not written as it has to be, found 'our study'",
        ),
    ],
)
def test_a_text_of_another_form_is_told_without_a_pattern(kind: type[Settings], text: str, message: str) -> None:
    assert message in refusal(text, kind)


def test_a_text_without_quotes_is_told_with_its_line() -> None:
    with pytest.raises(UsageProblem) as caught:
        parse(Agreement, changed("seed = 7", "seed = 7\nmethod = fedavg").encode(), PATH)
    assert caught.value.message.endswith(": method = fedavg")
    line = changed("seed = 7", "seed = 7\nmethod = fedavg").splitlines().index("method = fedavg") + 1
    assert str(caught.value.where) == f"{PATH}:{line}"
    assert caught.value.mend == "correct that line; a text stands between quotes"


@pytest.mark.parametrize(("kind", "name"), [(Agreement, "fedcollm.toml"), (Machine, "machine.toml")])
def test_a_mistake_is_mended_with_the_file_of_that_name(kind: type[Settings], name: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        parse(kind, b"nothing = 1\n", Path("study") / name)
    assert caught.value.mend == f"every key is explained in the {name} that `fedcollm init study` writes"


def test_what_is_not_utf_8_is_refused() -> None:
    with pytest.raises(UsageProblem, match="not UTF-8") as caught:
        parse(Agreement, AGREEMENT.encode("utf-16"), PATH)
    assert caught.value.mend == "save it as UTF-8"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_an_editor_of_another_system_adds_changes_no_setting(end: str) -> None:
    text = b"\xef\xbb\xbf" + AGREEMENT.replace("\n", end).encode()
    assert parse(Agreement, text, PATH) == parse(Agreement, AGREEMENT.encode(), PATH)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_devices_are_those_that_torch_knows(device: str) -> None:
    assert parse(Machine, f'device = "{device}"'.encode(), PATH).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_other_devices_are_refused(device: str) -> None:
    assert "device: " in refusal(f'device = "{device}"', Machine)


def test_settings_cannot_be_changed_once_read() -> None:
    agreement = parse(Agreement, AGREEMENT.encode(), PATH)
    with pytest.raises(ValueError, match="frozen"):
        agreement.federation.clients = 5


def test_rows_per_step_is_batch_size_times_accumulation() -> None:
    text = changed("batch_size = 4", "batch_size = 4\ngradient_accumulation = 3")
    assert parse(Agreement, text.encode(), PATH).client_training.rows_per_step == 12


def test_centralized_by_hand_is_refused_unless_it_is_one_client_that_tunes_the_llm() -> None:
    message = refusal(changed("seed = 7", 'seed = 7\nmethod = "centralized"'))
    assert "method centralized is one client that tunes the LLM: `fedcollm run --method centralized`" in message


def test_a_table_that_stands_twice_is_told_where_its_keys_belong(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    with pytest.raises(UsageProblem, match="not valid TOML") as caught:
        parse(Machine, b'[exchange]\n# remote = ""\n\n[exchange]\nremote = "file:///mnt"\n', path)
    assert "it is in the file above already: write all its keys there" in str(caught.value.mend)
