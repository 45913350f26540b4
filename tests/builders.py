"""What tests build on disk: a workspace with tiny real models and data that has a rule to learn."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from stages.aggregation.updates import Updates
    from stages.artefacts.adapter_files import Layout, Tensors
    from stages.data.examples import Example
    from stages.models.tuned import Tuned

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

LEXICON = "red blue green square circle star big small left right of the a is what colour shape size Q A : ? . 0 1 2 3"
WORDS = LEXICON.split()
COLOURS, SHAPES = ("red", "blue", "green"), ("square", "circle", "star")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Rows with a rule to learn: what follows a shape is its colour."""
    made = []
    for i in range(start, start + count):
        shape, size = SHAPES[i % 3], ("big", "small")[i // 3 % 2]
        made.append(
            {"prompt": f"Q : what colour is the {size} {shape} {i % 4} ? A :", "completion": f" {COLOURS[i % 3]}"}
        )
    return made


def write_rows(path: Path, items: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


AGREEMENT = """
[federation]
name = "tiny"
clients = 3
rounds = 2
seed = 7

[slm]
model = "models/slm"
dtype = "float32"
[slm.lora]
r = 4
alpha = 8

[llm]
model = "models/llm"
dtype = "float32"
[llm.lora]
r = 4
alpha = 8

[client_training]
steps = 6
batch_size = 4
learning_rate = 1e-2

[distillation]
steps = 5
batch_size = 4
slm_learning_rate = 1e-2
llm_learning_rate = 1e-2

[evaluation]
tasks = ["colours"]
batch_size = 8
"""

NO_NUMBERS = "learning_rate = 1e6\nweight_decay = 1.0"
"""Settings of [client_training] with which the loss is NaN after four steps at the latest, on any processor.

Decay alone takes each weight that is not zero to about minus 1e6 times itself in every step, and B's are not zero after
the first: after four, the product of B and A is beyond float32, and a norm of infinities is no number.
"""

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def questions(count: int) -> list[dict[str, object]]:
    """The rows as multiple-choice questions, for lm-eval."""
    return [
        {"question": row["prompt"], "choices": list(COLOURS), "answer": COLOURS.index(row["completion"].strip())}
        for row in rows(count)
    ]


def make_base_models(folder: Path) -> Path:
    """Build slm/ and llm/: GPT-2-shaped models of two sizes with one word-level tokenizer, random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    for role, (layers, width) in {"slm": (1, 16), "llm": (2, 32)}.items():
        torch.manual_seed(layers)
        config = GPT2Config(
            vocab_size=len(vocabulary),
            n_positions=64,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        GPT2LMHeadModel(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder


def make_unlike_models(folder: Path) -> Path:
    """Build slm-1/, slm-2/, slm-3/ and llm/: random weights, each of another architecture or size and tokenizer.

    slm-1 reads characters, slm-2 a byte-level BPE of 400 tokens, slm-3 as Llama 2 does: a mark for each space, one
    before the first word, <s> before all, and bytes for what is no token. The LLM reads a byte-level BPE of 500 tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import vocabularies

    texts = [*vocabularies.TEXTS, string.printable, LEXICON, *(row["prompt"] + row["completion"] for row in rows(12))]
    context = {"max_position_embeddings": 128, "num_attention_heads": 2}
    llama = context | {"model_type": "llama", "num_key_value_heads": 1, "initializer_range": 0.2}
    opt = context | {"model_type": "opt", "dropout": 0.0, "pad_token_id": None, "init_std": 0.2}
    undropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = undropped | {"model_type": "gpt2", "n_positions": 128, "n_head": 2, "initializer_range": 0.2}
    tokenizers_and_shapes = {
        "slm-1": (vocabularies.characters(texts), gpt2 | {"n_embd": 16, "n_layer": 1}),
        "slm-2": (
            vocabularies.byte_level(400, texts=texts),
            llama | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        ),
        "slm-3": (
            vocabularies.sentence_piece(300, first=True, texts=texts),
            opt | {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1},
        ),
        "llm": (
            vocabularies.byte_level(500, llama_3=True, texts=texts),
            llama | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        ),
    }
    for seed, (name, (tokenizer, shape)) in enumerate(tokenizers_and_shapes.items()):
        torch.manual_seed(seed)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(**shape, **ids, vocab_size=len(tokenizer))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def make_wide_models(folder: Path, base_models: Path) -> Path:
    """Two Llama-shaped models with random weights, of layers wide enough to have blocks of 64 weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    for role, layers in (("slm", 1), ("llm", 2)):
        tokenizer = AutoTokenizer.from_pretrained(base_models / role)
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=1,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder


def make_workspace(folder: Path, base_models: Path) -> Path:
    folder.mkdir()
    (folder / "fedcollm.toml").write_text(AGREEMENT)
    (folder / "models").symlink_to(base_models)
    for client in (1, 2, 3):
        write_rows(folder / "private" / f"client-{client}" / "train.jsonl", rows(12, start=12 * client))
    write_rows(folder / "private" / "server" / "auxiliary.jsonl", rows(12))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colours.yaml").write_text(TASK)
    (folder / "data").mkdir()
    for part in ("train", "test"):
        (folder / "data" / f"{part}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(12)))
    return folder


def give_template(folder: Path, template: str) -> None:
    """Give both models of a workspace this chat template, in copies of their own."""
    models = folder / "models"
    if models.is_symlink():
        shared = models.resolve()
        models.unlink()
        shutil.copytree(shared, models)
    for role in ("slm", "llm"):
        (models / role / "chat_template.jinja").write_text(template)


def make_unlike_workspace(folder: Path, unlike_models: Path) -> Path:
    """A workspace of FedMKT: three clients and an LLM of four tokenizers, two rounds; no stage has run."""
    make_workspace(folder, unlike_models)
    toml = folder / "fedcollm.toml"
    edit(toml, "seed = 7\n", 'seed = 7\nmethod = "fedmkt"\n')
    edit(toml, "models/slm", "models/slm-1")
    for client in (2, 3):
        shape = f"[clients.{client}.slm.lora]\nr = 2\n"
        toml.write_text(
            toml.read_text() + f'[clients.{client}.slm]\nmodel = "models/slm-{client}"\ndtype = "float32"\n{shape}'
        )
    taught = 'lambda_slm = 1.0\nlambda_llm = 1.0\nselect = "min-ce"\ntop_k = 32\n'
    edit(toml, "llm_learning_rate = 1e-2\n", f"llm_learning_rate = 1e-2\n{taught}")
    for client in (1, 2, 3):
        shutil.copy(folder / "private/server/auxiliary.jsonl", folder / f"private/client-{client}/public.jsonl")
    return folder


AVERAGE = '[aggregation]\naverage = true\nweighting = "samples"\n\n'


def make_equal_workspace(folder: Path, unlike_models: Path) -> Path:
    """A workspace of FedMKT whose clients tune one model, with 12, 24 and 8 rows, and are averaged; two rounds."""
    make_workspace(folder, unlike_models)
    toml = folder / "fedcollm.toml"
    edit(toml, "seed = 7\n", 'seed = 7\nmethod = "fedmkt"\n')
    edit(toml, "models/slm", "models/slm-1")
    edit(toml, "steps = 6", "epochs = 1.0")
    taught = 'lambda_slm = 1.0\nlambda_llm = 1.0\nselect = "min-ce"\ntop_k = 32\n'
    edit(toml, "llm_learning_rate = 1e-2\n", f"llm_learning_rate = 1e-2\n{taught}")
    edit(toml, "[distillation]", f"{AVERAGE}[distillation]")
    for client, count in EQUAL_ROWS.items():
        write_rows(folder / f"private/client-{client}/train.jsonl", rows(count, start=12 * client))
        shutil.copy(folder / "private/server/auxiliary.jsonl", folder / f"private/client-{client}/public.jsonl")
    return folder


EQUAL_ROWS = {1: 12, 2: 24, 3: 8}
QUESTIONS = 20


def make_unlike_study(folder: Path, unlike_models: Path) -> Path:
    """A workspace of FedMKT to compare methods in, its task named as one of the paper's."""
    make_unlike_workspace(folder, unlike_models)
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace("1e-2", "0.1").replace("colours", "arc_easy"))
    edit(toml, "rounds = 2", "rounds = 1")
    edit(folder / "tasks/colours.yaml", "colours", "arc_easy")
    (folder / "tasks/colours.yaml").rename(folder / "tasks/arc_easy.yaml")
    edit(toml, "steps = 6", "steps = 3")
    edit(toml, "steps = 5", "epochs = 1.0")
    ask(folder)
    return folder


def make_study(folder: Path, base_models: Path) -> Path:
    """A workspace to compare methods in: two clients with unequal data, counted in epochs, and questions on which even
    a little training changes answers."""
    make_workspace(folder, base_models)
    toml = folder / "fedcollm.toml"
    edit(toml, "clients = 3", "clients = 2")
    edit(toml, "steps = 6", "epochs = 1.0")
    edit(toml, "steps = 5", "epochs = 1.0")
    toml.write_text(toml.read_text().replace("1e-2", "0.3"))
    shutil.rmtree(folder / "private/client-3")
    write_rows(folder / "private/client-1/train.jsonl", rows(11))
    write_rows(folder / "private/client-2/train.jsonl", rows(5, start=20))
    write_rows(folder / "private/server/auxiliary.jsonl", rows(7, start=30))
    ask(folder)
    return folder


def ask(folder: Path) -> None:
    """Put questions of random words into a workspace."""
    draw = random.Random(1)
    asked = []
    for _ in range(QUESTIONS):
        words = draw.sample(WORDS, 9)
        asked.append({"question": " ".join(words[:6]), "choices": words[6:], "answer": draw.randrange(3)})
    (folder / "data/test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that stands in a file exactly once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


def published(folder: Path) -> dict[str, str]:
    """The digest of everything that stages have put in its place: no locks, no checkpoints, no drafts."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = path.suffix == ".lock" or any(part.startswith(".") for part in name.parts)
        if name.parts[0] in ("exchange", "private", "results", "exports") and path.is_file() and not is_hidden:
            with path.open("rb") as file:
                found[str(name)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def remembered(secrets: Path) -> dict[str, str]:
    """The digest of everything that parties keep outside the workspace: keys, and what they did in each round."""
    found = (path for path in sorted(secrets.rglob("*")) if path.is_file())
    return {str(path.relative_to(secrets)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def adapters(folder: Path) -> dict[str, str]:
    """The same for adapters alone; private logs hold times."""
    return {name: digest for name, digest in published(folder).items() if name.endswith((".json", ".safetensors"))}


def drafts(folder: Path) -> list[Path]:
    """What an interrupted publication would leave half written."""
    return [path for ending in ("partial", "replaced") for path in folder.rglob(f"*.{ending}")]


def sign(adapter: Path, **claims: object) -> None:
    """Make an adapter's manifest agree with what lies in the folder now, as a forger would, and claim this."""
    path = adapter / "manifest.json"
    manifest = json.loads(path.read_text()) | claims
    for name, entry in manifest["files"].items():
        content = (adapter / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    path.write_text(json.dumps(manifest))


def scale(adapter: Path, factor: float) -> None:
    """Multiply what an adapter adds, and sign it."""
    import safetensors.numpy

    weights = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    scaled = {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(scaled, weights, metadata={"format": "pt"})
    sign(adapter)


def bundled(bundle: Path) -> dict[str, bytes]:
    """What is in a bundle, by Python's own zipfile."""
    with zipfile.ZipFile(bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name != "bundle.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- in memory

Family = Literal["gpt2", "opt", "llama", "qwen2", "gemma3_text"]


def tiny_model(
    family: Family = "gpt2", *, vocabulary: int = 40, width: int = 32, layers: int = 2, seed: int = 0
) -> Any:
    """A model of one of these architectures with random weights large enough to have opinions, in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    long = {"max_position_embeddings": 64, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    gated = {"intermediate_size": 2 * width, "initializer_range": 0.2}
    shape: dict[str, Any] = {
        "gpt2": {"n_positions": 64, "n_embd": width, "n_layer": layers, "n_head": 2, "initializer_range": 0.2}
        | dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),
        "opt": long | {"word_embed_proj_dim": width, "ffn_dim": 2 * width, "init_std": 0.2, "dropout": 0.0},
        "llama": long | gated,
        "qwen2": long | gated | {"num_key_value_heads": 1},
        "gemma3_text": long | gated | {"num_key_value_heads": 1, "head_dim": width // 2, "sliding_window": 24},
    }[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **ids, **shape)).eval()


def tuned(
    role: Literal["slm", "llm"],
    *,
    family: Family = "gpt2",
    dropout: float = 0.0,
    layers: Sequence[str] = (),
    **shape: int,
) -> Tuned:
    """A tiny model with an adapter of random values, as stages hold it; it has no tokenizer and no identity.

    layers: which have an adapter, by default those of PEFT's choice.
    """
    from stages.artefacts.manifest import BaseIdentity
    from stages.models import adapters as parts
    from stages.models import packing
    from stages.models.tuned import Tuned
    from stages.workspace.agreement import Lora, Model

    base = tiny_model(family, **({"seed": 1 if role == "slm" else 2} | shape))
    longest_packed = packing.packs(base)
    lora = Lora(r=4, alpha=8, dropout=dropout, target_modules=list(layers))
    model = parts.attach(base, Model(model="tiny", lora=lora))
    parts.put(model, random_adapter(parts.layout(model), seed=3))
    nobody = BaseIdentity(architecture=family, weights_sha256="0" * 64, tokenizer_sha256="0" * 64)
    no_tokenizer: Any = None
    return Tuned(role, model, no_tokenizer, nobody, autocast=False, longest_packed=longest_packed)


def random_adapter(layout: Layout, *, seed: int, scale: float = 0.1) -> Tensors:
    """An adapter of this layout in which nothing is zero."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in sorted(layout.items())}


def sent(
    folder: Path,
    theta: Tensors,
    adapters: Sequence[Tensors],
    clients: Iterable[int],
    *,
    write: Callable[[Tensors], bytes] | None = None,
) -> Updates:
    """These adapters as files in a folder, to be combined. write: the files' bytes, if not as they are written here."""
    from stages.aggregation.updates import Updates
    from stages.artefacts.adapter_files import config_bytes, weights_bytes
    from stages.artefacts.manifest import BaseIdentity, FileEntry, Manifest
    from stages.artefacts.reading import Artefact
    from stages.workspace.agreement import Lora
    from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS

    lora = Lora(r=next((len(tensor) for name, tensor in theta.items() if ".lora_A." in name), Lora().r))
    heads, config = [], config_bytes(lora, target_modules=[], fan_in_fan_out=False)
    for client, adapter in zip(clients, adapters, strict=True):
        place, content = folder / f"client-{client}", (write or weights_bytes)(adapter)
        place.mkdir()
        (place / ADAPTER_WEIGHTS).write_bytes(content)
        manifest = Manifest(
            federation="tiny",
            agreement_sha256="0" * 64,
            stage="client-train",
            round=1,
            client=client,
            parents={},
            files={ADAPTER_WEIGHTS: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))},
            base=BaseIdentity(architecture="none", weights_sha256="0" * 64, tokenizer_sha256="0" * 64),
            lora=lora,
            parameters=sum(tensor.size for tensor in theta.values()),
            versions={},
        )
        signed = manifest.model_dump_json().encode()
        (place / "manifest.json").write_bytes(signed)
        head = Artefact(place, manifest, signed, hashlib.sha256(signed).hexdigest(), {ADAPTER_CONFIG: config})
        heads.append(head)
    return Updates(heads, theta, lambda event: None)


def examples(lengths: list[tuple[int, int]], *, vocabulary: int = 40, seed: int = 0) -> list[Example]:
    """Rows of random tokens, each of so many prompt tokens and so many answer tokens."""
    from stages.data.examples import Example

    draw = random.Random(seed)
    return [
        Example([draw.randrange(2, vocabulary) for _ in range(prompt + answer)], prompt) for prompt, answer in lengths
    ]


def rewrite(result: Path, value: dict[str, Any]) -> None:
    """A result as another evaluation might have written it: with a digest of its own."""
    from stages.artefacts import records
    from stages.files import reading

    value.pop(records.DIGEST, None)
    result.write_bytes(reading.json_bytes(records.stamped(value)))
