"""Mutual information of laws with known values: our error and CPU time beside the public estimators'.

Every side reads the same samples in this process, on one thread. Peers that are not installed are left out:
scikit-learn comes with the package; ``pip install ennemi npeet-plus infomeasure benchmark-mi`` adds the others.

    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py                # 63 laws, 5,000 samples, 3 draws each
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --part published  # the 40 laws of bmi (Czyz et al. 2023)
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --part kl      # 30 divergences from samples
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --part labels  # labels against 1 to 64 columns
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --part emi     # coverage of clustered delta EMI

``--coverage`` (with the first four) prints instead how often the 95 % intervals hold the truth, where no warning is
given and in all; ``--laws`` keeps those whose name holds a word. The laws are in known_laws.py and known_pairs.py
beside this file. A ratio is our mean absolute error over the smallest of the peers', for each law.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from known_laws import LAWS, Law
from known_pairs import CLASSES, PAIRS

from tinyalign.theory import Estimate, delta_emi, kl_from_samples, mutual_information

N, DRAWS, FEW = 5000, 3, 2000


def peers() -> dict[str, Callable[[np.ndarray, np.ndarray], float | None]]:
    """The public estimators that are installed, each with its defaults, in nats."""
    from sklearn.feature_selection import mutual_info_regression

    def plane(estimate: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float | None]:
        return lambda x, y: estimate(x, y) if x.shape[1] == y.shape[1] == 1 else None

    found = {"scikit-learn": plane(lambda x, y: mutual_info_regression(x, y[:, 0], random_state=0)[0])}
    try:
        import ennemi

        found["ennemi"] = plane(lambda x, y: float(np.ravel(ennemi.estimate_mi(y[:, 0], x[:, 0]))[0]))
    except ImportError:
        pass
    try:
        import npeet_plus

        found["NPEET-plus"] = lambda x, y: float(npeet_plus.mi(x, y)) * float(np.log(2))
    except ImportError:
        pass
    try:
        import infomeasure

        found["infomeasure"] = lambda x, y: (
            float(infomeasure.mutual_information(x, y, approach="ksg")) if x.shape[1] <= 25 else None
        )
    except ImportError:
        pass
    try:
        from bmi.estimators import KSGEnsembleFirstEstimator

        found["bmi"] = lambda x, y: float(KSGEnsembleFirstEstimator().estimate(x, y))
    except ImportError:
        pass
    return found


def timed(estimate: Callable[[], float | None]) -> tuple[float | None, float]:
    start = time.process_time()
    value = estimate()
    return value, time.process_time() - start


def published() -> list[Law]:
    """The benchmark tasks that come with bmi, to which nothing here was fitted."""
    import bmi

    def law(task: bmi.Task) -> Law:
        def sample(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
            x, y = task.sample(n, int(rng.integers(2**31)))
            return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

        hard = any(word in task.id for word in ("student", "spiral", "swissroll"))
        return Law(task.id, hard, float(task.mutual_information), sample)

    return [law(task) for task in bmi.benchmark.BENCHMARK_TASKS.values()]


def cases_of(part: str) -> list[Any]:
    return published() if part == "published" else {"mi": LAWS, "kl": PAIRS, "labels": CLASSES}[part]


class Beside(NamedTuple):
    """One law: our mean error and the best peer's, their ratio, and our time over the fastest peer's."""

    hard: bool
    columns: int
    ours: float
    best: float
    ratio: float
    time: float


def errors(laws: list[Law], draws: int, word: str) -> None:
    others = peers()
    print(
        f"{N} samples, mean of {draws} draws; error in nats / CPU seconds; ratios to the best and to the fastest peer"
    )
    print(f"{'law':28s} {'truth':>6s} {'tinyalign':>15s} {'error':>6s} {'time':>6s}  " + "  ".join(others))
    rows = []
    for number, law in enumerate(laws):
        if word not in law.name:
            continue
        found: dict[str, list[tuple[float, float]]] = {}
        for draw in range(draws):
            x, y = law.sample(np.random.default_rng(100 * number + draw), N)
            sides = {"tinyalign": lambda x=x, y=y: mutual_information(x, y).value}
            if x.shape[1] <= 60:
                sides |= {name: (lambda f=f, x=x, y=y: f(x, y)) for name, f in others.items()}
            for name, side in sides.items():
                value, seconds = timed(side)
                if value is not None:
                    found.setdefault(name, []).append((abs(value - law.truth), seconds))
        mean = {name: (float(np.mean([e for e, _ in each])), min(t for _, t in each)) for name, each in found.items()}
        ours = mean.pop("tinyalign")
        line = f"{law.name:28s} {law.truth:6.3f} {ours[0]:7.4f} /{ours[1]:6.3f}"
        if mean:
            best, fastest = min(e for e, _ in mean.values()), min(t for _, t in mean.values())
            ratio = max(ours[0], 5e-4) / max(best, 5e-4)
            rows.append(Beside(law.hard, x.shape[1] + y.shape[1], ours[0], best, ratio, ours[1] / fastest))
            line += f" {ratio:6.2f} {ours[1] / fastest:6.2f}  "
        print(line + "  ".join(f"{name} {e:.4f} /{t:.3f}" for name, (e, t) in mean.items()), flush=True)
    summary(rows)


def summary(rows: list[Beside]) -> None:
    for hard in (False, True):
        kind = "hard" if hard else "ordinary"
        for low, high in ((2, 3), (4, 6), (7, 10), (11, 200), (2, 200)):
            part = [row for row in rows if row.hard == hard and low <= row.columns <= high]
            if not part:
                continue
            ratio = np.exp(np.mean([np.log(row.ratio) for row in part]))
            times = [row.time for row in part]
            ours, best = (np.mean([getattr(row, side) for row in part]) for side in ("ours", "best"))
            print(
                f"{len(part)} {kind} laws, {low} to {high} columns: error {ours:.3f}, best peer {best:.3f}; ratio "
                f"{ratio:.3f} (geometric mean), at most {max(row.ratio for row in part):.2f}; CPU over the fastest "
                f"{min(times):.2f} to {max(times):.2f}"
            )


def cover(name: str, truth: float, estimate: Callable[[int], Estimate], repetitions: int) -> None:
    held, quiet, covered = 0, 0, 0
    for repetition in range(repetitions):
        result = estimate(10_000 + repetition)
        hit = result.low <= truth <= result.high
        held += hit
        if not result.warnings:
            quiet, covered = quiet + 1, covered + hit
    share = f"{covered / quiet:.3f}" if quiet else "-"
    print(f"{name:48s} without a warning {share} of {quiet}; all {held / repetitions:.3f}", flush=True)


def coverage(part: str, repetitions: int, word: str) -> None:
    count = N if part in ("mi", "published") else FEW
    print(f"{repetitions} repetitions of {count} samples; intervals at 95 %")
    for case in cases_of(part):
        if word not in case.name or "128" in case.name:
            continue

        def one(seed: int, case=case) -> Estimate:
            samples = case.sample(np.random.default_rng(seed), count)
            return kl_from_samples(*samples) if part == "kl" else mutual_information(*samples)

        cover(case.name, case.truth, one, repetitions)


def beside(part: str, draws: int, word: str) -> None:
    """Our error and time on divergences or labels, beside the plain nearest neighbours among our own candidates."""
    estimate, plain, said = {
        "kl": (kl_from_samples, "plain", "plain nearest neighbours"),
        "labels": (mutual_information, "ross", "Ross's neighbours"),
    }[part]
    print(f"{N} samples, {draws} draws; mean absolute error in nats / CPU seconds (what was chosen)")
    for number, case in enumerate(cases_of(part)):
        if word not in case.name:
            continue
        ours, near, seconds, methods = [], [], [], set()
        for draw in range(draws):
            samples = case.sample(np.random.default_rng(1000 * number + draw), N)
            start = time.process_time()
            result = estimate(*samples)
            seconds.append(time.process_time() - start)
            ours.append(abs(result.value - case.truth))
            near.append(abs(result.candidates[plain] - case.truth))
            methods.add(result.method)
        used = ", ".join(sorted(methods))
        print(
            f"{case.name:48s} {case.truth:6.3f}: {np.mean(ours):.4f} / {min(seconds):.3f} ({used}); {said} "
            f"{np.mean(near):.4f}",
            flush=True,
        )


def paired_differences(repetitions: int) -> None:
    """Differences that share a part within each image, with skew and unequal numbers of questions."""
    print(f"{repetitions} repetitions; share of 95 % intervals that hold the true difference, by method")
    parts = {
        "normal": lambda rng, n: rng.normal(0, 0.5, n),
        "exponential": lambda rng, n: 0.5 * (rng.exponential(size=n) - 1),
        "lognormal": lambda rng, n: 0.5 * (rng.lognormal(0, 0.8, n) - np.exp(0.32)),
    }
    for clusters in (30, 60, 150):
        for name, shared in parts.items():
            for ragged in (False, True):
                held = dict.fromkeys(("bootstrap-t", "bca", "t"), 0)
                for repetition in range(repetitions):
                    rng = np.random.default_rng(repetition)
                    sizes = rng.integers(1, 16, clusters) if ragged else np.full(clusters, 8)
                    groups = np.repeat(np.arange(clusters), sizes)
                    noise = rng.gumbel(size=len(groups)) - np.euler_gamma
                    gain = 0.2 + shared(rng, clusters)[groups] + noise
                    for method in held:
                        result = delta_emi(gain, np.zeros_like(gain), groups, interval=method, draws=1000)
                        held[method] += result.low <= 0.2 <= result.high
                shares = "  ".join(f"{method} {count / repetitions:.3f}" for method, count in held.items())
                print(
                    f"{clusters} images, {name} part, {'1 to 15' if ragged else '8'} questions each: {shares}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("mi", "published", "kl", "labels", "emi"), default="mi")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--laws", default="", help="only those whose name holds this")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--repetitions", type=int, default=200)
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arguments.part == "emi":
            paired_differences(max(arguments.repetitions, 1000))
        elif arguments.coverage:
            coverage(arguments.part, arguments.repetitions, arguments.laws)
        elif arguments.part in ("kl", "labels"):
            beside(arguments.part, arguments.draws, arguments.laws)
        else:
            errors(cases_of(arguments.part), arguments.draws, arguments.laws)


if __name__ == "__main__":
    main()
