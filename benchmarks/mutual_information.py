"""Mutual information of laws with known values: our error and CPU time beside the public estimators'.

Every side reads the same samples in this process, on one thread. Peers that are not installed are left out:
scikit-learn comes with the package; ``pip install ennemi npeet-plus infomeasure`` adds the others.

    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py             # 20 laws, 5,000 samples, 3 draws each
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --coverage  # how often the 95 % intervals hold the truth
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --part kl   # divergences from samples
    OMP_NUM_THREADS=1 python benchmarks/mutual_information.py --part emi  # coverage of clustered delta EMI, 1,000 each

A ratio is our mean absolute error over the smallest of the peers', for each law; below 1 is better than all of them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import digamma, gammaln, ndtr

from tinyalign.theory import delta_emi, kl_from_samples, mutual_information

Samples = tuple[np.ndarray, np.ndarray]
N, DRAWS = 5000, 3


class Law(NamedTuple):
    name: str
    hard: bool
    truth: float
    sample: Callable[[np.random.Generator, int], Samples]


def normal(name: str, correlations: list[float], *, width: int = 0, hard: bool = False, left=None, right=None) -> Law:
    """Correlated pairs of normals beside columns of noise, then maps that keep the information."""
    rho = np.zeros(max(width, len(correlations)))
    rho[: len(correlations)] = correlations

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x, e = rng.normal(size=(2, n, len(rho)))
        y = rho * x + np.sqrt(1 - rho**2) * e
        return (left or (lambda z: z))(x), (right or left or (lambda z: z))(y)

    return Law(name, hard, float(-0.5 * np.log1p(-(rho**2)).sum()), sample)


def student(name: str, freedom: float, correlations: list[float], after=None) -> Law:
    width = len(correlations)
    rho = np.array(correlations)

    def f(a: float) -> float:
        return float(gammaln(a / 2) - a / 2 * digamma(a / 2))

    radial = f(freedom) + f(freedom + 2 * width) - 2 * f(freedom + width)

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x, e = rng.normal(size=(2, n, width))
        scale = np.sqrt(freedom / rng.chisquare(freedom, n))[:, None]
        x, y = x * scale, (rho * x + np.sqrt(1 - rho**2) * e) * scale
        return (after(x), after(y)) if after else (x, y)

    return Law(name, True, float(-0.5 * np.log1p(-(rho**2)).sum()) + radial, sample)


def turn(width: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    return lambda z: z @ rotation


def cube(z: np.ndarray) -> np.ndarray:
    return z * np.sqrt(np.abs(z))


def spiral(z: np.ndarray) -> np.ndarray:
    angle = 0.33 * (z**2).sum(axis=1)
    turned = z.copy()
    turned[:, 0] = np.cos(angle) * z[:, 0] - np.sin(angle) * z[:, 1]
    turned[:, 1] = np.sin(angle) * z[:, 0] + np.cos(angle) * z[:, 1]
    return turned


def uniform_noise(rng: np.random.Generator, n: int) -> Samples:
    x = rng.uniform(size=(n, 1))
    return x, x + rng.uniform(-0.1, 0.1, (n, 1))


def gamma_exponential(rng: np.random.Generator, n: int) -> Samples:
    x = rng.gamma(2.0, size=(n, 1))
    return x, rng.exponential(size=(n, 1)) / x


def swiss_roll(rng: np.random.Generator, n: int) -> Samples:
    x, e = rng.normal(size=(2, n, 1))
    angle = 1.5 * np.pi * (1 + 2 * ndtr(x))
    return np.hstack([angle * np.cos(angle), angle * np.sin(angle)]), ndtr(0.8 * x + 0.6 * e)


LAWS = [
    normal("bivariate normal", [0.88]),
    normal("weak normal", [0.5]),
    normal("lognormal margins", [0.6], left=np.exp),
    normal("uniform margins", [0.75], left=ndtr),
    normal("half-cube 5+5", [0.8, 0.7], width=5, left=cube),
    normal("uniform 3+3", [0.8, 0.6], width=3, left=ndtr),
    normal("pairs 2+2", [0.7, 0.5]),
    normal("pairs 4+4", [0.8, 0.8], width=4),
    normal("pairs 25+25", [0.6] * 8, width=25),
    normal("pairs 128+128", list(np.linspace(0.9, 0.05, 24)), width=128, left=turn(128, 1), right=turn(128, 2)),
    Law("uniform noise 0.1", False, 0.1 - float(np.log(0.2)), uniform_noise),
    Law("gamma-exponential", False, float(digamma(3.0) - np.log(2.0)), gamma_exponential),
    student("Student 1, 1+1", 1, [0.0]),
    student("Student 1, 2+2", 1, [0.0, 0.0]),
    student("Student 2, 3+3, asinh", 2, [0.6] * 3, np.arcsinh),
    student("Student 3, 5+5", 3, [0.7] * 5),
    normal("rotated 10+10", [0.9, 0.8, 0.7, 0.6, 0.5], width=10, hard=True, left=turn(10, 1), right=turn(10, 2)),
    normal("padded half-cube", [0.9, 0.7], width=6, hard=True, left=lambda z: turn(6, 3)(cube(z))),
    normal("spiral 2+2", [0.8, 0.8], hard=True, left=spiral, right=lambda z: z),
    Law("swiss roll 2+1", True, float(-0.5 * np.log(1 - 0.64)), swiss_roll),
]


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
    return found


def timed(estimate: Callable[[], float | None]) -> tuple[float | None, float]:
    start = time.process_time()
    value = estimate()
    return value, time.process_time() - start


def errors(draws: int) -> None:
    others = peers()
    print(f"{N} samples, mean of {draws} draws; error in nats / CPU seconds")
    print(f"{'law':24s} {'truth':>6s} {'tinyalign':>15s} {'ratio':>6s} {'time':>6s}  " + "  ".join(others))
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for number, law in enumerate(LAWS):
        found: dict[str, list[tuple[float, float]]] = {}
        for draw in range(draws):
            x, y = law.sample(np.random.default_rng(100 * number + draw), N)
            sides = {"tinyalign": lambda x=x, y=y: mutual_information(x, y).value}
            sides |= {name: (lambda f=f, x=x, y=y: f(x, y)) for name, f in others.items()}
            for name, side in sides.items():
                value, seconds = timed(side)
                if value is not None:
                    found.setdefault(name, []).append((abs(value - law.truth), seconds))
        mean = {name: (np.mean([e for e, _ in rows]), min(t for _, t in rows)) for name, rows in found.items()}
        ours = mean.pop("tinyalign")
        line = f"{law.name:24s} {law.truth:6.3f} {ours[0]:7.4f} /{ours[1]:6.3f}"
        if mean:
            best, fastest = min(e for e, _ in mean.values()), min(t for _, t in mean.values())
            ratios[law.hard].append(np.log(max(ours[0], 5e-4) / max(best, 5e-4)))
            line += f" {ours[0] / max(best, 5e-4):6.2f} {ours[1] / fastest:6.2f}  "
        print(line + "  ".join(f"{name} {e:.4f} /{t:.3f}" for name, (e, t) in mean.items()), flush=True)
    for hard, logs in ratios.items():
        if logs:
            kind = "hard" if hard else "ordinary"
            print(f"geometric mean of the error ratios, {kind} laws: {np.exp(np.mean(logs)):.3f}")


def coverage(repetitions: int) -> None:
    print(f"{N} samples, {repetitions} repetitions; intervals at 95 %")
    for law in LAWS:
        if law.name == "pairs 128+128":
            continue
        held, quiet, covered = 0, 0, 0
        for repetition in range(repetitions):
            result = mutual_information(*law.sample(np.random.default_rng(10_000 + repetition), N))
            hit = result.low <= law.truth <= result.high
            held += hit
            if not result.warnings:
                quiet, covered = quiet + 1, covered + hit
        share = f"{covered / quiet:.3f}" if quiet else "-"
        print(f"{law.name:24s} without a warning {share} of {quiet}; all {held / repetitions:.3f}", flush=True)


def divergences(draws: int) -> None:
    print(f"{N} samples of each law, {draws} draws; mean absolute error in nats / CPU seconds")
    for width, shift, scale in ((1, 1.0, 1.0), (3, 0.5, 1.3), (3, 1.0, 0.8), (20, 0.2, 1.2), (20, 0.3, 0.9)):
        truth = width * (np.log(scale) + (1 + shift**2) / (2 * scale**2) - 0.5)
        ours, plain, seconds = [], [], []
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            p, q = rng.normal(size=(N, width)), scale * rng.normal(size=(N, width)) + shift
            start = time.process_time()
            result = kl_from_samples(p, q)
            seconds.append(time.process_time() - start)
            ours.append(abs(result.value - truth))
            plain.append(abs(result.candidates["knn"] - truth))
        print(
            f"normal, {width} dimensions, truth {truth:.3f}: {np.mean(ours):.4f} / {min(seconds):.3f}; "
            f"plain nearest neighbours {np.mean(plain):.4f}"
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
    parser.add_argument("--part", choices=("mi", "kl", "emi"), default="mi")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--repetitions", type=int, default=200)
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arguments.part == "kl":
            divergences(arguments.draws)
        elif arguments.part == "emi":
            paired_differences(max(arguments.repetitions, 1000))
        elif arguments.coverage:
            coverage(arguments.repetitions)
        else:
            errors(arguments.draws)


if __name__ == "__main__":
    main()
