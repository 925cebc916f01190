"""Whether the processes that draw still answer, which Triton's own health does not tell before 26.01; nor does it start them again.

    python3 healthy.py [SERVER [MODEL]]

The model is `enat`, or what ENAT_MODEL says, by default. Asks for a class that no engine has, which the model refuses without drawing.
Exit code 1 where the server, the model or its process is gone; 0 where it answers, or is too busy to answer soon.
"""

import json
import os
import sys
import urllib.error
import urllib.request

PATIENCE = 8  # seconds

server, model = [*sys.argv[1:], *("127.0.0.1:8000", os.environ.get("ENAT_MODEL", "enat"))[len(sys.argv) - 1 :]]
body = {"inputs": [{"name": "class_id", "datatype": "INT64", "shape": [1, 1], "data": [-1]}]}
here = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the container's proxy is for what is elsewhere
try:
    here.open(f"http://{server}/v2/models/{model}/infer", json.dumps(body).encode(), PATIENCE)
except urllib.error.HTTPError as error:  # 503 where the queue is full
    said = error.read().decode(errors="replace")
    if error.code != 503 and "expected a class of" not in said:
        sys.exit(said or f"{server}: {error}")
except TimeoutError:
    pass
except urllib.error.URLError as error:
    if not isinstance(error.reason, TimeoutError):
        sys.exit(f"{server}: {error.reason}")
