"""Cases out of the server's own OpenAPI document, by schemathesis: none may be answered with a failure of the server.

    pip install schemathesis
    python benchmarks/serve_schema.py --cases 5000

Starts `armchair serve` on a free port of this machine, and for each operation of the document makes up requests that
keep to it and requests that do not. Ends with 1 where an answer had a status of 500 or more.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis

sys.path.insert(0, str(Path(__file__).parent))
from serve_load import running  # noqa: E402


def check(port: int, cases: int, seed: int) -> dict[str, Any]:
    """So many cases in all, shared out among the operations that have something to make up."""
    import schemathesis
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", timeout=30)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    operations = [result.ok() for result in schema.get_all_operations()]
    rich = [op for op in operations if len(op.body) or len(list(op.path_parameters)) or len(list(op.query))]
    statuses: Counter[str] = Counter()
    failures: list[str] = []

    def some(operation: Any, count: int, seed: int) -> None:
        either = operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=either)
        def one(case: Any) -> None:
            if isinstance(case.body, dict) and len(repr(case.body)) % 4:  # else hardly any name is that of a model
                case.body = {k: v for k, v in case.body.items() if k not in ("model", "size")}
            response = case.call(timeout=60)
            statuses[str(response.status_code)] += 1
            if response.status_code >= 500:
                failures.append(f"{case.method} {case.path}: {response.status_code}: {case.as_curl_command()[:500]}")

        one()

    broken = 0
    for operation in operations:
        # One without a body or a parameter has a single case.
        wanted = sum(statuses.values()) + (-(-cases // len(rich)) if operation in rich else 1)
        while (left := wanted - sum(statuses.values())) > 0 and broken < 1000:
            seed += 1
            try:
                some(operation, min(left, 100), seed)
            except ValueError as error:  # schemathesis 4.32 cannot compare some of the files that it makes up
                if "Binary" not in str(error):
                    raise
                broken += 1
    return {
        "cases": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "failures": failures[:10],
        "rounds_cut_short_by_schemathesis": broken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with running(args.model) as (server, port):
        found = check(port, args.cases, args.seed)
        found["alive"] = server.poll() is None
    print(json.dumps(found, indent=1))
    if found["failures"] or not found["alive"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
