"""A reward model behind HTTP, on a machine of its own: what trlx.RemoteReward asks.

Usage: python -m examples.hh.serve_reward [--model FOLDER] [--label NAME] [--port 8000]
then:  REWARD_URL=http://that-machine:8000 torchrun --nproc-per-node 8 -m examples.hh.ppo_hh

Without --model it serves Dahoas/gptj-rm-static. There is no authentication: keep it inside your network.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import trlx
from examples.common import RewardFn
from examples.hh.task import GPTJ, PUBLISHED
from examples.published_rewards import load_gptj_reward


def server(judge: RewardFn, port: int = 8000, host: str = "") -> HTTPServer:
    """Answers ``{"samples": [...], ...}`` with ``{"rewards": [...]}``, one request at a time."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = 200, {"rewards": [float(score) for score in judge(samples=question["samples"])]}
            except (KeyError, TypeError, ValueError) as error:
                status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer((host, port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a sequence classifier, hub name or folder")
    parser.add_argument("--label", help="which of its labels, if it has several")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if args.model:
        judge = trlx.SequenceClassifierReward(args.model, label=args.label)
    else:
        judge = load_gptj_reward(GPTJ, **PUBLISHED)
    server(judge, args.port).serve_forever()
