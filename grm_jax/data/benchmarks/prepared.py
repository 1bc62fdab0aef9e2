"""The benchmarks as tensorflow-datasets: official files prepared once into array_record, then read at random.

`prepare` writes, `read` gives the same benchmark as its loader. Neither needs TensorFlow. Each benchmark is a registered
builder of its name, whose files are "downloaded by hand": `tfds build --manual_dir` finds it once this module is imported,
and `tfds.data_source(name, data_dir=...)` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core import dataset_metadata

from grm_jax.data.benchmarks.cases import Benchmark, Case
from grm_jax.data.benchmarks.loaders import BENCHMARKS, KINDS
from grm_jax.data.jsonl import DataError
from grm_jax.datatypes import Example, Message

VERSION = "1.1.0"
_INFO = "dataset_info.json"
_SPLIT = "test"


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Cases of one benchmark; the subclass has its name."""

    VERSION = tfds.core.Version(VERSION)
    files: str | None = None  # one file, or a folder; by default what `--manual_dir` says
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the benchmark's official files, as `eval --data` takes them"

    @classmethod
    def get_metadata(cls) -> dataset_metadata.DatasetMetadata:
        said = (BENCHMARKS[cls.name].__doc__ or "").strip()
        return dataset_metadata.DatasetMetadata(description=said, citation="", tags=[])

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        features = {
            "id": text,
            "roles": texts,
            "contents": texts,
            "responses": texts,
            "scores": tfds.features.Sequence(np.float64),
            "reference": texts,  # none or one, as the next two
            "strength": tfds.features.Sequence(np.float64),
            "source": texts,
            "subset": text,
            "group": text,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), metadata=tfds.core.MetadataDict()
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = self.files or str(dl_manager.manual_dir)
        benchmark = BENCHMARKS[self.name](files)
        if not benchmark.cases:
            raise DataError(f"{files} has no cases of {self.name}: give the official files")
        self.info.metadata["dropped"] = dict(benchmark.dropped)
        self.info.metadata["order"] = [case.example.id for case in benchmark.cases]
        self.info.metadata["cases"] = _digest(benchmark)
        return {_SPLIT: self._generate_examples(benchmark)}

    def _generate_examples(self, benchmark: Benchmark) -> Iterator[tuple[str, dict[str, Any]]]:
        for case in benchmark.cases:
            example = case.example
            yield (
                example.id,
                {
                    "id": example.id,
                    "roles": [message.role for message in example.messages],
                    "contents": [message.content for message in example.messages],
                    "responses": list(example.responses),
                    "scores": list(example.scores),
                    "reference": [] if example.reference is None else [example.reference],
                    "strength": [] if example.strength is None else [example.strength],
                    "source": [] if example.source is None else [example.source],
                    "subset": case.subset,
                    "group": case.group,
                },
            )


BUILDERS = {name: type(name.title().replace("_", ""), (_Builder,), {"name": name}) for name in BENCHMARKS}


def prepare(name: str, data: str, data_dir: str) -> str:
    """Write the official files in `data` as dataset `name` below `data_dir`; its folder, as `read` takes it.

    What is there already is kept. Raises FileNotFoundError and DataError as the loader does, and DataError for files
    without a case, or a folder prepared from other data.
    """
    builder = BUILDERS[name](data_dir=data_dir, file_format="array_record")
    builder.files, place = data, epath.Path(data).expanduser()
    if is_prepared(str(builder.data_dir)) and builder.info.metadata["cases"] != _digest(BENCHMARKS[name](data)):
        raise DataError(
            f"{builder.data_dir} was prepared from other data than {data}: remove it, or give another --output"
        )
    folder = place.parent if place.is_file() else place
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    return str(builder.data_dir)


def _digest(benchmark: Benchmark) -> str:
    """Of everything that a dataset keeps."""
    said = json.dumps([[dataclasses.asdict(case) for case in benchmark.cases], dict(benchmark.dropped)])
    return hashlib.sha256(said.encode()).hexdigest()


def is_prepared(folder: str) -> bool:
    """Whether `prepare` has written this folder."""
    return (epath.Path(folder).expanduser() / _INFO).exists()


def read(folder: str) -> Benchmark:
    """The benchmark in a folder that `prepare` has written. Raises DataError for a dataset of another kind."""
    try:
        builder = tfds.builder_from_directory(epath.Path(folder).expanduser())
    except ParseError as error:  # the dataset hub's library writes files of the same name
        raise DataError(
            f"{folder} holds a {_INFO} that is not of tensorflow-datasets: give the files below it"
        ) from error
    if "source" not in (builder.info.features or {}) and builder.name in BENCHMARKS:
        raise DataError(f"{folder} was written by an earlier version, which kept less: prepare it again")
    if builder.name not in BENCHMARKS:
        raise DataError(f"{folder} holds the dataset {builder.name}: give one of {', '.join(BENCHMARKS)}")
    cases = {case.example.id: case for case in map(_case, builder.as_data_source(split=_SPLIT))}
    known = builder.info.metadata
    return Benchmark(builder.name, [cases[id] for id in known["order"]], KINDS[builder.name], known["dropped"])


def _case(row: dict[str, Any]) -> Case:
    keys = "id", "roles", "contents", "responses", "reference", "source", "subset", "group"
    text = {key: _text(row[key]) for key in keys}
    example = Example(
        id=text["id"],
        messages=tuple(Message(*turn) for turn in zip(text["roles"], text["contents"], strict=True)),
        responses=tuple(text["responses"]),
        scores=tuple(map(float, row["scores"])),
        reference=(*text["reference"], None)[0],
        strength=(*map(float, row["strength"]), None)[0],
        source=(*text["source"], None)[0],
    )
    return Case(example, text["subset"], text["group"])


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [one.decode() for one in value]
