#!/usr/bin/env bash
# Real input for FedMKT: ARC-Easy, clients of different families and a server, every round by the separate commands.
#   tests/fedmkt_arc_easy.sh DATA FOLDER ROWS QUESTIONS ROUNDS LLM SLM-1 [SLM-2 ...]
# DATA holds datasets/arc_easy/*.jsonl. Of ROWS training questions the share PUBLIC (0.25) is public; QUESTIONS questions of
# the split SCORED (test) are scored. LAMBDA (0.1111), DIVERGENCE (forward) and SEED (1) are settings. ONLY=prepare stops
# before anything is trained.
set -euo pipefail
data=$(realpath "$1") folder=$2 rows=$3 questions=$4 rounds=$5
llm=$(realpath "$6")
slms=("${@:7}")
clients=${#slms[@]}
export HF_HUB_OFFLINE=1
for at in "${!slms[@]}"; do slms[at]=$(realpath "${slms[at]}"); done

fedcollm init "$folder" --template blank --clients "$clients" --rounds "$rounds"
cd "$folder"
mkdir -p data
head -n "$rows" "$data/datasets/arc_easy/train.jsonl" > data/train.jsonl
head -n "$questions" "$data/datasets/arc_easy/${SCORED:-test}.jsonl" > data/test.jsonl
sed -i -e 's|^dataset_path:.*|dataset_path: json|' -e '/^dataset_name:/d' \
    -e '$a dataset_kwargs: {data_files: {train: data/train.jsonl, validation: data/test.jsonl, test: data/test.jsonl}}' tasks/arc_easy.yaml
cat > fedcollm.toml << END
[federation]
name = "arc-easy"
clients = $clients
rounds = $rounds
seed = ${SEED:-1}
method = "fedmkt"

[slm]
model = "${slms[0]}"
[llm]
model = "$llm"

[client_training]
epochs = 1.0
batch_size = 8
learning_rate = 3e-4
[distillation]
epochs = 1.0
batch_size = 8
slm_learning_rate = 3e-4
llm_learning_rate = 1e-4
lambda_slm = ${LAMBDA:-0.1111}
lambda_llm = ${LAMBDA:-0.1111}
divergence = "${DIVERGENCE:-forward}"
select = "min-ce"
[data]
tasks = ["arc_easy"]
auxiliary_share = ${PUBLIC:-0.25}
too_long = "skip"
[evaluation]
tasks = ["arc_easy"]
END
for client in $(seq 2 "$clients"); do
    printf '[clients.%s.slm]\nmodel = "%s"\n' "$client" "${slms[client - 1]}" >> fedcollm.toml
done

fedcollm prepare
fedcollm align
[ "${ONLY:-}" = prepare ] && exit
for client in $(seq "$clients"); do
    fedcollm evaluate --zero-shot $( ((client == 1)) && echo "--model slm" || echo "--client $client")
done
fedcollm evaluate --zero-shot --model llm
for round in $(seq "$rounds"); do
    for client in $(seq "$clients"); do
        fedcollm client-train --client "$client" --round "$round"
        fedcollm share-knowledge --client "$client" --round "$round"
    done
    fedcollm co-distill --round "$round"
    fedcollm share-knowledge --server --round "$round"
    for client in $(seq "$clients"); do
        fedcollm client-distill --client "$client" --round "$round"
    done
done
fedcollm evaluate --model llm --round "$rounds"
for client in $(seq "$clients"); do fedcollm evaluate --client "$client" --round "$rounds"; done
