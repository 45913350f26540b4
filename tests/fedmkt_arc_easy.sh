#!/usr/bin/env bash
# Real input for FedMKT: ARC-Easy, three clients of different families and a server, every round by the separate commands.
#   tests/fedmkt_arc_easy.sh DATA FOLDER ROWS QUESTIONS ROUNDS LLM SLM-1 SLM-2 SLM-3
# DATA holds datasets/arc_easy/*.jsonl. Of ROWS training questions a quarter is public; QUESTIONS test questions are scored.
set -euo pipefail
data=$(realpath "$1") folder=$2 rows=$3 questions=$4 rounds=$5
llm=$(realpath "$6") slm_1=$(realpath "$7") slm_2=$(realpath "$8") slm_3=$(realpath "$9")
export HF_HUB_OFFLINE=1

fedcollm init "$folder" --template blank --clients 3 --rounds "$rounds"
cd "$folder"
mkdir -p data
head -n "$rows" "$data/datasets/arc_easy/train.jsonl" > data/train.jsonl
head -n "$questions" "$data/datasets/arc_easy/validation.jsonl" > data/validation.jsonl
head -n "$questions" "$data/datasets/arc_easy/test.jsonl" > data/test.jsonl
sed -i -e 's|^dataset_path:.*|dataset_path: json|' -e '/^dataset_name:/d' \
    -e '$a dataset_kwargs: {data_files: {train: data/train.jsonl, validation: data/validation.jsonl, test: data/test.jsonl}}' tasks/arc_easy.yaml
cat > fedcollm.toml << END
[federation]
name = "arc-easy"
clients = 3
rounds = $rounds
seed = ${SEED:-1}
method = "fedmkt"

[slm]
model = "$slm_1"
[llm]
model = "$llm"
[clients.2.slm]
model = "$slm_2"
[clients.3.slm]
model = "$slm_3"

[client_training]
epochs = 1.0
batch_size = 8
learning_rate = 3e-4
[distillation]
epochs = 1.0
batch_size = 8
slm_learning_rate = 3e-4
llm_learning_rate = 1e-4
lambda_slm = 0.1111
lambda_llm = 0.1111
select = "min-ce"
[data]
tasks = ["arc_easy"]
auxiliary_share = 0.25
too_long = "skip"
[evaluation]
tasks = ["arc_easy"]
END

fedcollm prepare
fedcollm align
for client in 1 2 3; do fedcollm evaluate --zero-shot $( ((client == 1)) && echo "--model slm" || echo "--client $client"); done
fedcollm evaluate --zero-shot --model llm
for round in $(seq "$rounds"); do
    for client in 1 2 3; do
        fedcollm client-train --client "$client" --round "$round"
        fedcollm share-knowledge --client "$client" --round "$round"
    done
    fedcollm co-distill --round "$round"
    fedcollm share-knowledge --server --round "$round"
    for client in 1 2 3; do
        fedcollm client-distill --client "$client" --round "$round"
    done
done
fedcollm evaluate --model llm --round "$rounds"
for client in 1 2 3; do fedcollm evaluate --client "$client" --round "$rounds"; done
