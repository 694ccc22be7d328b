"""Object stores, the one that CI cannot run: az:// against Azurite, Azure's own emulator, which comes by npm.

    npm install --prefix build/azurite azurite@3 && python scripts/nightly_azure.py build/azurite/node_modules/.bin

The same contract as S3 and Google Cloud Storage in the tests: every method of Objects, and a cache in both stores
written, read, verified, damaged answers included, and pulled. Prints one line per check; exit code 0 where all hold.
"""

import base64
import hashlib
import hmac
import http.client
import os
import subprocess
import sys
import tempfile
from email.utils import formatdate
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "storage_specs"))

from faulty_proxy import FaultyProxy
from objects_contract import check_cache, check_objects

from storage_specs.object_roots import open_objects

ACCOUNT, CONTAINER = "account", "caches"


def start(programs: Path, key: str) -> tuple[subprocess.Popen[str], int]:
    """The emulator on a free port, once it listens."""
    words = [programs / "azurite-blob", "--inMemoryPersistence", "--blobPort", "0", "--skipApiVersionCheck", "--loose"]
    process = subprocess.Popen(
        [*map(str, words), "--disableTelemetry"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
    )
    return process, _port(process.stdout)


def _port(lines: IO[str]) -> int:
    for line in lines:
        if "successfully listens on" in line:
            return int(line.rpartition(":")[2].rstrip("/\n"))
    raise SystemExit("Azurite did not start")


def make_container(port: int, key: str) -> None:
    """Which obstore cannot do."""
    date = formatdate(usegmt=True)
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
    signed += f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(key), signed.encode(), hashlib.sha256).digest()).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    connection.request("PUT", f"/{ACCOUNT}/{CONTAINER}?restype=container", headers=headers)
    if (status := connection.getresponse().status) != 201:
        raise SystemExit(f"Azurite made no container ({status})")
    connection.close()


def main(programs: Path) -> None:
    key = base64.b64encode(os.urandom(64)).decode()
    process, port = start(programs, key)
    proxy = FaultyProxy(("127.0.0.1", port))
    try:
        make_container(port, key)
        os.environ |= {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": key,
            "AZURE_STORAGE_ENDPOINT": f"{proxy.url}/{ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
        }
        check_objects(open_objects(f"az://{CONTAINER}/some/where"))
        print("every method of Objects: good")
        for store in ("zarr", "arrow"):
            for method in ("GET", "PUT"):
                for fault in (500, 503, "lose", "refuse"):
                    proxy.fail(fault, method=method, path="shards")
            with tempfile.TemporaryDirectory() as folder:
                check_cache(f"az://{CONTAINER}/{store}", Path(folder), store)
            if [fault for fault in proxy.faults if fault.times]:
                raise SystemExit("not every fault was met")
            print(f"a cache in the {store} store, with 8 broken answers: good")
    finally:
        proxy.stop()
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
