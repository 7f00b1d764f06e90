"""What the server has done, in the text format that Prometheus reads."""

from collections import Counter

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


class Metrics:
    """Counts of requests and their seconds, by route and status; everything else is asked for when it is rendered."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()  # method, route, status
        self.pictures: Counter[str] = Counter()  # model
        self._seconds: dict[str, Counter[float]] = {}  # route: bucket
        self._total: dict[str, tuple[int, float]] = {}

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered, or given up by whoever asked, which counts as 499."""
        self.requests[method, route, status] += 1
        buckets = self._seconds.setdefault(route, Counter())
        for bucket in BUCKETS:
            buckets[bucket] += seconds <= bucket
        count, total = self._total.get(route, (0, 0.0))
        self._total[route] = count + 1, total + seconds

    def render(self, models: dict[str, dict[str, float]]) -> str:
        """The page. `models`: gauges of each open model, such as {"emoji": {"waiting": 3}}."""
        lines = _head("armchair_requests_total", "counter", "Requests by route and status.")
        for (method, route, status), count in sorted(self.requests.items()):
            labels = f'method="{_label(method)}",route="{_label(route)}",status="{status}"'
            lines.append(f"armchair_requests_total{{{labels}}} {count}")
        lines += _head("armchair_request_seconds", "histogram", "Seconds from a request to the end of its answer.")
        for route, buckets in sorted(self._seconds.items()):
            count, total = self._total[route]
            name = f'route="{_label(route)}"'
            lines += [f'armchair_request_seconds_bucket{{{name},le="{b}"}} {buckets[b]}' for b in BUCKETS]
            lines += [
                f'armchair_request_seconds_bucket{{{name},le="+Inf"}} {count}',
                f"armchair_request_seconds_sum{{{name}}} {total:.6f}",
                f"armchair_request_seconds_count{{{name}}} {count}",
            ]
        lines += _head("armchair_pictures_total", "counter", "Pictures drawn and sent, by model.")
        lines += [
            f'armchair_pictures_total{{model="{_label(model)}"}} {count}'
            for model, count in sorted(self.pictures.items())
        ]
        for gauge in sorted({name for gauges in models.values() for name in gauges}):
            lines += _head(f"armchair_{gauge}", "gauge", f"{gauge.replace('_', ' ').capitalize()}, by open model.")
            lines += [
                f'armchair_{gauge}{{model="{_label(model)}"}} {gauges[gauge]:g}'
                for model, gauges in sorted(models.items())
            ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
