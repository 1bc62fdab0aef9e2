"""The official files of the benchmarks, as cases. Each function takes a folder (or one file), local or gs://.

Every loader keeps the files' order of responses; the judge shows them in orders of its own. Rows that no metric can use,
such as a preference that is a tie, are dropped and counted. What is missing is an error that says where the files are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath

from grm_jax.data.benchmarks import metrics
from grm_jax.data.benchmarks.cases import Benchmark, Case, Kind, query_of
from grm_jax.data.benchmarks.files import find, parsed
from grm_jax.data.jsonl import DataError, RowError, conversation_of, id_of, list_of, parse_row, text_of, turns_of
from grm_jax.datatypes import Example, Message

KINDS: dict[str, Kind] = {
    "reward_bench": Kind(
        metrics.reward_bench,
        official={subset: count for section in metrics.SECTIONS.values() for subset, count in section.items()}
        | {"math-prm": 447, "xstest-should-refuse": 154, "xstest-should-respond": 250},  # these count otherwise
    ),
    "reward_bench_2": Kind(
        metrics.reward_bench_2,
        official={"Factuality": 475, "Focus": 495, "Math": 183, "Precise IF": 160, "Safety": 450, "Ties": 102},
    ),
    "ppe_preference": Kind(metrics.preferences, rows=16_038),
    "ppe_correctness": Kind(metrics.ppe_correctness),
    "rmb": Kind(metrics.rmb),
    "rm_bench": Kind(
        metrics.rm_bench,
        official={"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157},
    ),
    "judge_bench": Kind(metrics.judge_bench, least=2, rows=350),  # split gpt
    "real_mistake": Kind(
        metrics.real_mistake,
        official={
            f"{task} {model}": rows
            for task in (
                "math_word_problem_generation",
                "finegrained_fact_verification",
                "answerability_classification",
            )
            for model, rows in (("gpt-4-0613", 140), ("meta-llama/Llama-2-70b-chat-hf", 160))
        },
    ),
    "llm_bar": Kind(
        metrics.llm_bar, least=2, official={"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
    ),
    "preferences": Kind(metrics.preferences),
}
_HUB = "download it from the dataset hub as parquet or JSON Lines: "


def reward_bench(folder: str) -> Benchmark:
    """RewardBench 1: rows {prompt, chosen, rejected, subset, id}, split `filtered`; the prior sets are left out."""
    patterns = ("**/filtered*.parquet", "**/filtered/*.parquet", "**/*.parquet")
    where = f"{_HUB}allenai/reward-bench, split filtered"
    paths = find(folder, patterns, where)
    counts = KINDS["reward_bench"].official
    dropped: Counter[str] = Counter()

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        subset = text_of(row["subset"], "subset")
        if subset not in counts:
            dropped[f"subset {subset} is not in the score"] += 1
            return []
        responses = text_of(row["chosen"], "chosen"), text_of(row["rejected"], "rejected")
        return [
            _case(f"{subset}/{id_of(row.get('id', number))}", _messages(row["prompt"]), responses, (1.0, 0.0), subset)
        ]

    return _benchmark("reward_bench", parsed(paths, parse, where), dropped)


def reward_bench_2(folder: str) -> Benchmark:
    """RewardBench 2: rows {id, prompt, chosen: [...], rejected: [...], subset}; ids of `Ties` are ref:N and tied:N.

    A row of `Ties` has any number of either, every other row one chosen and three rejected.
    """
    where = f"{_HUB}allenai/reward-bench-2"
    official = KINDS["reward_bench_2"].official

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        subset, id = text_of(row["subset"], "subset"), id_of(row["id"])
        if subset not in official:
            raise RowError(subset, f"a subset is one of {', '.join(official)}")
        right, wrong = _chosen_and_rejected(row)
        if subset != "Ties" and (len(right), len(wrong)) != (1, 3):
            raise RowError(_numbers(right, wrong), f"a row of {subset} has one chosen and three rejected responses")
        kind, _, prompt = id.partition(":")
        if subset == "Ties" and kind not in ("ref", "tied"):
            raise RowError(id, "an id of Ties is ref:N or tied:N")
        labels = (1.0,) * len(right) + (0.0,) * len(wrong)
        group = f"Ties/{prompt}" if subset == "Ties" else None  # both rows of a prompt make its numbers
        return [_case(f"{subset}/{id}", _messages(row["prompt"]), (*right, *wrong), labels, subset, group)]

    return _benchmark("reward_bench_2", parsed(find(folder, ("**/*.parquet",), where), parse, where))


def _chosen_and_rejected(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    right, wrong = ([text_of(text, key) for text in list_of(row[key], key)] for key in ("chosen", "rejected"))
    return right, wrong


def _numbers(right: Sequence[str], wrong: Sequence[str]) -> dict[str, int]:
    return {"chosen": len(right), "rejected": len(wrong)}


def ppe_preference(folder: str) -> Benchmark:
    """PPE human preference: rows {question_id, prompt, response_1, response_2, winner, language}; ties are dropped."""
    where = f"{_HUB}lmarena-ai/PPE-Human-Preference-V1"
    paths = find(folder, ("**/*.parquet",), where)
    labels = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0)}
    dropped: Counter[str] = Counter()

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        winner = text_of(row["winner"], "winner")
        if winner.startswith("tie"):
            dropped["tie"] += 1
            return []
        if winner not in labels:
            raise RowError(winner, "a winner is model_a, model_b or a tie")
        responses = text_of(row["response_1"], "response_1"), text_of(row["response_2"], "response_2")
        id = id_of(row.get("question_id", number))
        return [_case(id, _messages(row["prompt"]), responses, labels[winner], str(row.get("language") or "all"))]

    return _benchmark("ppe_preference", parsed(paths, parse, where), dropped)


def ppe_correctness(folder: str) -> Benchmark:
    """PPE correctness: five sets in files or folders of their names; each conflict pair of a row is a case.

    Several models answer one question, each in a row {question_id, model_name, ...} of its own.
    """
    names = ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")
    where = f"{_HUB}lmarena-ai/PPE-{{{','.join(names)}}}-Best-of-K"
    cases: list[Case] = []
    for name in names:
        patterns = (f"*{name}*/**/*.parquet", f"*{name}*.parquet")
        cases += parsed(find(folder, patterns, where, several=True), _conflicts(name), where)
    return _benchmark("ppe_correctness", cases)


def _conflicts(name: str) -> Callable[[epath.Path, int, dict[str, Any]], list[Case]]:
    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        messages, group = _messages(row["prompt"]), f"{name}/{id_of(row.get('question_id', number))}"
        answered = f"{group}/{text_of(row['model_name'], 'model_name')}" if row.get("model_name") else group
        scores, pairs = list_of(row["scores"], "scores"), row["sampled_conflict_pairs"]
        if not isinstance(pairs, list):
            raise RowError(pairs, "'sampled_conflict_pairs' is a list of pairs")
        found = []
        for pair in pairs:
            i, j = _conflict(pair, scores)
            responses = tuple(text_of(row[f"response_{k + 1}"], f"response_{k + 1}") for k in (i, j))
            labels = float(scores[i]), float(scores[j])
            found.append(_case(f"{answered}/{i}-{j}", messages, responses, labels, name, group))
        return found

    return parse


def _conflict(pair: Any, scores: Sequence[Any]) -> tuple[int, int]:
    """The responses of a conflict pair, counted from 0. Raises RowError."""
    known = range(len(scores))
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(i) is int and i in known for i in pair):
        raise RowError(pair, f"a conflict pair is two responses, each a whole number from 0 to {len(scores) - 1}")
    labels = [scores[i] for i in pair]
    if not all(isinstance(label, bool | int | float) and label in (0, 1) for label in labels):
        raise RowError(labels, "'scores' are true or false, or 1 and 0")
    if labels[0] == labels[1]:
        raise RowError(pair, "a conflict pair has one right response")
    return pair[0], pair[1]


def rmb(folder: str) -> Benchmark:
    """RMB: `Pairwise_set` and `BoN_set`, each with Helpfulness and Harmlessness; a best-of-n list is one case."""
    where = "take the folder RMB_dataset of the repository Zhou-Zoey/RMB-Reward-Model-Benchmark"
    cases: list[Case] = []
    for part in ("Helpfulness", "Harmlessness"):
        for kind, parse in (("Pairwise_set", _rmb_pair), ("BoN_set", _rmb_list)):
            paths = find(folder, (f"**/{kind}/{part}/**/*.json",), where, several=True)
            cases += parsed(paths, lambda path, number, row, p=part, of=parse: of(p, row), where)
    return _benchmark("rmb", cases)


def _rmb_pair(part: str, row: Mapping[str, Any]) -> list[Case]:
    responses = tuple(text_of(row[key]["answer"], key) for key in ("chosen", "reject"))
    subset, id = f"{part} pairwise", id_of(row["pair_uid"])
    return [_case(f"{subset}/{id}", _messages(row["conversation_input"]), responses, (1.0, 0.0), subset)]


def _rmb_list(part: str, row: Mapping[str, Any]) -> list[Case]:
    losers = [text_of(loser["answer"], "loser_list") for loser in list_of(row["loser_list"], "loser_list")]
    responses, labels = (text_of(row["bon_best"]["answer"], "bon_best"), *losers), (1.0,) + (0.0,) * len(losers)
    subset, id = f"{part} BoN", id_of(row["bon_uid"])
    return [_case(f"{subset}/{id}", _messages(row["conversation_input"]), responses, labels, subset)]


def rm_bench(folder: str) -> Benchmark:
    """RM-Bench: rows {id, prompt, chosen: [3], rejected: [3], domain}; a row's six responses are judged as one list.

    Rows {id, prompt | messages, responses: [6], subset} have the chosen ones first.
    """
    where = "take total_dataset.json of the repository THU-KEG/RM-Bench"
    official = KINDS["rm_bench"].official

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        if "responses" in row:
            example = parse_row(row, str(number))
            messages, domain = example.messages, text_of(row["subset"], "subset")
            right, wrong = example.responses[:3], example.responses[3:]
            if len(scores := example.scores or ()) == 6 and min(scores[:3]) <= max(scores[3:]):
                raise RowError(scores, "of 'responses' the three chosen come first, and have the higher scores")
        else:
            messages, domain = _messages(row["prompt"]), text_of(row["domain"], "domain")
            right, wrong = _chosen_and_rejected(row)
        if (len(right), len(wrong)) != (3, 3):
            raise RowError(_numbers(right, wrong), "a row has three chosen and three rejected responses")
        if domain not in official:
            raise RowError(domain, f"a domain is one of {', '.join(official)}")
        return [_case(f"{domain}/{id_of(row['id'])}", messages, (*right, *wrong), (1.0,) * 3 + (0.0,) * 3, domain)]

    paths = find(folder, ("**/total_dataset.json", "**/*.json"), where)
    return _benchmark("rm_bench", parsed(paths, parse, where))


_JUDGE_BENCH = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")


def judge_bench(folder: str) -> Benchmark:
    """JudgeBench: rows {pair_id, source, question, response_A, response_B, label}; subsets are the four kinds of source."""
    where = f"{_HUB}ScalerLab/JudgeBench, split gpt (or claude)"
    labels = {"A>B": (1.0, 0.0), "B>A": (0.0, 1.0)}

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        if row["label"] not in labels:
            raise RowError(row["label"], "a label is A>B or B>A")
        source = text_of(row["source"], "source")
        subset = next((name for name in _JUDGE_BENCH if source.startswith(name)), source)
        responses = text_of(row["response_A"], "response_A"), text_of(row["response_B"], "response_B")
        return [_case(id_of(row["pair_id"]), _messages(row["question"]), responses, labels[row["label"]], subset)]

    # In the repository judgments of other judges lie beside the data.
    patterns = ("**/data/*gpt*.jsonl", "**/*gpt*.jsonl", "**/gpt/*.parquet", "**/*.jsonl")
    paths = find(folder, patterns, where)
    return _benchmark("judge_bench", parsed(paths, parse, where))


def real_mistake(folder: str) -> Benchmark:
    """ReaLMistake: rows {input, llm_response, error_label, metadata}; one response, label 1 for no error.

    A folder a task; beside them are examples of the same rows, and in the repository what other judges said.
    """
    where = "unpack data.zip of the repository psunlpgroup/ReaLMistake"
    patterns = ("**/data/*/*.jsonl", "*/*.jsonl", "**/*.jsonl")
    labels = {"error": 0.0, "no_error": 1.0}

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        if row["error_label"] not in labels:
            raise RowError(row["error_label"], "an error_label is error or no_error")
        told = row["metadata"]
        subset = f"{told['task_name']} {told['llm_response_model']}"
        id = f"{subset}/{id_of(told.get('id', f'{path.name}-{number}'))}"
        response = (text_of(row["llm_response"], "llm_response"),)
        return [_case(id, _messages(row["input"]), response, (labels[row["error_label"]],), subset)]

    return _benchmark("real_mistake", parsed(find(folder, patterns, where), parse, where))


def llm_bar(folder: str) -> Benchmark:
    """LLMBar: rows {input, output_1, output_2, label} in Natural and Adversarial/{Neighbor,GPTInst,GPTOut,Manual}."""
    where = "take the folder Dataset/LLMBar of the repository princeton-nlp/LLMBar"
    official = KINDS["llm_bar"].official

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        if row["label"] not in (1, 2):
            raise RowError(row["label"], "a label is 1 or 2")
        subset = path.parent.name
        if subset not in official:
            raise RowError(subset, f"the folder of a file is one of {', '.join(official)}")
        labels = (1.0, 0.0) if row["label"] == 1 else (0.0, 1.0)
        responses = text_of(row["output_1"], "output_1"), text_of(row["output_2"], "output_2")
        return [_case(f"{subset}/{number}", _messages(row["input"]), responses, labels, subset)]

    paths = find(folder, ("**/dataset.json", "**/*.json"), where)
    return _benchmark("llm_bar", parsed(paths, parse, where))


def preferences(folder: str) -> Benchmark:
    """Rows as `score` and training take them, with labels; those without a single best response are dropped."""
    where = 'give JSON Lines such as {"prompt": "...", "chosen": "...", "rejected": "..."}'
    paths = find(folder, ("**/*.jsonl",), where)
    dropped: Counter[str] = Counter()

    def parse(path: epath.Path, number: int, row: dict[str, Any]) -> list[Case]:
        example = parse_row(row, f"{path.name}-{number}")
        if example.scores is None:
            raise RowError(sorted(row), "a row has labels: 'scores', or 'chosen' and 'rejected'")
        if example.scores.count(max(example.scores)) > 1 or len(example.responses) < 2:
            dropped["no single best response"] += 1
            return []
        subset = text_of(row["subset"], "subset") if row.get("subset") else example.source or path.name.split(".")[0]
        return [Case(example, subset, query_of(example.messages))]

    cases = parsed(paths, parse, where)
    again = [id for id, count in Counter(case.example.id for case in cases).items() if count > 1]
    if again:
        raise DataError(
            f"{len(again)} ids stand in several rows, the first {again[0]!r}: each has its own, make them so"
        )
    return _benchmark("preferences", cases, dropped)


def _benchmark(name: str, cases: list[Case], dropped: Mapping[str, int] = MappingProxyType({})) -> Benchmark:
    """The benchmark. A case that comes again counts again, as in the official totals, under an id of its own."""
    taken, seen = {case.example.id for case in cases}, Counter[str]()
    for i, case in enumerate(cases):
        id = case.example.id
        seen[id] += 1
        if seen[id] == 1:
            continue
        new = next(found for n in itertools.count(seen[id]) if (found := f"{id}#{n}") not in taken)
        taken.add(new)
        cases[i] = dataclasses.replace(case, example=dataclasses.replace(case.example, id=new))
    return Benchmark(name, cases, KINDS[name], dropped)


def _case(
    id: str, messages: tuple[Message, ...], responses: tuple[str, ...], labels: tuple[float, ...], subset: str,
    group: str | None = None,
) -> Case:  # fmt: skip
    return Case(Example(id, messages, responses, labels), subset, group or query_of(messages))


def _messages(prompt: object) -> tuple[Message, ...]:
    """A conversation that is text or turns."""
    if isinstance(prompt, str):
        return conversation_of({"prompt": prompt})
    return turns_of(prompt, "prompt")


BENCHMARKS: dict[str, Callable[[str], Benchmark]] = {
    loader.__name__: loader
    for loader in (
        *(reward_bench, reward_bench_2, ppe_preference, ppe_correctness, rmb),
        *(rm_bench, judge_bench, real_mistake, llm_bar, preferences),
    )
}
