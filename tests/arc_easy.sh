#!/usr/bin/env bash
# Real input: ARC-Easy, four clients and a server, two really trained models, every round by the separate commands.
#   tests/arc_easy.sh DATA FOLDER [QUESTIONS [ROUNDS]]
# DATA holds datasets/arc_easy/*.jsonl, models/stories3M and models/stories0.8M-sheared. With QUESTIONS only so many
# training questions and test questions are used.
set -euo pipefail
data=$(realpath "$1") folder=$2 questions=${3:-}
export HF_HUB_OFFLINE=1

fedcollm init "$folder" --template blank --clients 4 --rounds "${4:-2}"
cd "$folder"
mkdir -p data
for part in train validation test; do
    head -n "${questions:-1000000}" "$data/datasets/arc_easy/$part.jsonl" > "data/$part.jsonl"
done
sed -i -e 's|^dataset_path:.*|dataset_path: json|' -e '/^dataset_name:/d' \
    -e '$a dataset_kwargs: {data_files: {train: data/train.jsonl, validation: data/validation.jsonl, test: data/test.jsonl}}' tasks/arc_easy.yaml
sed -i -e "s|^model = \"gpt2\"  |model = \"$data/models/stories0.8M-sheared\"  |" -e "s|^model = \"gpt2-large\"|model = \"$data/models/stories3M\"|" fedcollm.toml

fedcollm prepare
./run_rounds.sh
fedcollm evaluate --zero-shot --model slm
fedcollm evaluate --zero-shot --model llm
fedcollm status
