"""Compares formulas for `MathMatch`, in a process of its own: reads pairs (answer, output) as lines of JSON."""

import json
import logging
import sys

from math_verify import parse, verify


def main() -> None:
    logging.disable()  # it would report each comparison that it gives up
    print("ready", flush=True)
    for line in sys.stdin:
        answer, output = json.loads(line)
        marked = "$" in answer or "\\boxed" in answer
        right = parse(answer) if marked else parse(f"${answer}$") or parse(answer)
        print(verify(right, parse(output)) if right else "unknown", flush=True)


if __name__ == "__main__":
    main()
