#!/usr/bin/env bash
# All of training on a task that takes minutes: a tiny base model, then rejective fine-tuning, then reinforcement learning,
# and the accuracy on held-out examples after each; then a meta RM that guides the fine-tuned model's votes. Writes
# runs/tiny-SEED in the current folder.
#
#   launch/learn.sh [SEED ...]     by default 0
#
# Fails unless, for every seed, accuracy is below 80 % after RFT and at least 95 % after RL, with under 1 % parse failures,
# and on unseen examples 8 votes beat one and 8 guided votes 8 plain ones (configs/tiny_votes.py).
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
python="$(bash "$here/setup.sh")"
configs="$here/../configs"

for seed in "${@:-0}"; do
    run="runs/tiny-$seed" began=$SECONDS
    "$python" "$configs/tiny_task.py" "$run/data" --seed "$seed"
    "$python" -m grm_jax.main rft --config "$configs/tiny_base.py" --seed "$seed" --output "$run/base" \
        --general "$run/data/base.jsonl" "$run/data/general.jsonl"
    started=$SECONDS
    "$python" -m grm_jax.main rft --config "$configs/tiny_rft.py" --seed "$seed" --output "$run/rft" \
        --model "$run/base/model" --items.files "$run/data/train.jsonl" --general "$run/data/general.jsonl"
    "$python" -m grm_jax.main rl --config "$configs/tiny_rl.py" --seed "$seed" --output "$run/rl" \
        --model "$run/rft/model" --items.files "$run/data/train.jsonl"
    "$python" - "$run" "$((SECONDS - started))" <<'END'
import json, pathlib, sys

run, seconds = pathlib.Path(sys.argv[1]), sys.argv[2]
rows = {stage: (run / stage / "held_out.jsonl").read_text().splitlines() for stage in ("rft", "rl")}
rft, rl = (json.loads(rows[stage][-1]) for stage in ("rft", "rl"))
for stage, row in (("RFT", rft), ("RL", rl)):
    print(
        f"{run}: after {stage} {row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%}) of {row['examples']} "
        f"held-out examples, parse failures {row['failures']:.2%}"
    )
print(f"{run}: RFT and RL took {seconds} s")
sys.exit(not (rft["accuracy"] < 0.80 and rl["accuracy"] >= 0.95 and rl["failures"] < 0.01))
END
    "$python" -m grm_jax.main sample --seed "$seed" --items.files "$run/data/train.jsonl" --items.limit 2000 \
        --model "$run/rft/model" --template "$configs/tiny_template.txt" --max-new-tokens 72 --slots 256 \
        --output "$run/judged.jsonl"
    "$python" -m grm_jax.main meta_rm --config "$configs/tiny_meta.py" --seed "$seed" --output "$run/meta" \
        --model "$run/rft/model" --samples "$run/judged.jsonl"
    "$python" "$configs/tiny_votes.py" "$run" --seed "$seed"
    echo "$run: all stages took $((SECONDS - began)) s"
done
