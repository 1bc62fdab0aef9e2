"""Google storage on this machine: the emulator, with the conditions that TensorStore writes under.

A checkpoint's database is written by replacing its manifest only where that is still the generation that was read. The
emulator tells no generation when it sends an object and heeds no condition, so two writers at once would fail, or lose
what one of them wrote.
"""

import contextlib
import functools
import http.server
import threading
import urllib.parse
from collections.abc import Iterator

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

OBJECTS = "/storage/v1/b/"
UPLOADS = "/upload/storage/v1/b/"


class Handler(RequestHandler):
    """The emulator's requests, with the generation of what is sent and `ifGenerationMatch`, `ifGenerationNotMatch`."""

    told: str | None = None  # generation that the response's header names

    def do_GET(self) -> None:
        now = self.generation()
        if self.holds(now, otherwise=304):
            self.told = now
            super().do_GET()

    def do_POST(self) -> None:
        if self.holds(self.generation(), otherwise=412):
            super().do_POST()

    def do_DELETE(self) -> None:
        if self.holds(self.generation(), otherwise=412):
            super().do_DELETE()

    def end_headers(self) -> None:
        if self.told is not None:
            self.send_header("x-goog-generation", self.told)
        super().end_headers()

    def generation(self) -> str | None:
        """Of the object that the request is about; None where there is no such object."""
        url = urllib.parse.urlsplit(self.path)
        if url.path.startswith(UPLOADS):
            name = urllib.parse.parse_qs(url.query).get("name", [""])[0]
            bucket = url.path.removeprefix(UPLOADS).split("/")[0]
        else:
            bucket, _, name = url.path.removeprefix(OBJECTS).partition("/o/")
            name = urllib.parse.unquote(name)
        found = self.storage.objects.get(bucket, {}).get(name)
        return found and found["generation"]

    def holds(self, now: str | None, *, otherwise: int) -> bool:
        """Whether the request's conditions hold; else it is answered: 412, or `otherwise` if nothing is new."""
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        wanted, known = asked.get("ifGenerationMatch"), asked.get("ifGenerationNotMatch")
        missed = [412] if wanted and wanted != [now or "0"] else []
        missed += [otherwise] if known and known == [now or "0"] else []
        if missed:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(missed[0])
            self.send_header("Content-Length", "0")
            self.end_headers()
        return not missed


@contextlib.contextmanager
def bucket(name: str) -> Iterator[dict[str, str]]:
    """Serve an empty bucket; yields the environment of its clients."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(name, storage)
    with http.server.HTTPServer(("127.0.0.1", 0), functools.partial(Handler, storage)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{served.server_port}"
        # Without the last two the clients of TensorStore and gcsfs wait for the real service.
        try:
            yield {
                "STORAGE_EMULATOR_HOST": host,
                "TENSORSTORE_GCS_HTTP_URL": host,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
        finally:
            served.shutdown()
