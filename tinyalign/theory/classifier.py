"""Information between features and labels from cross-fitted classifiers: H(Y) less the held-out cross-entropy.

Nearest neighbours lose most of the information in many dimensions. A classifier that never saw a sample predicts its
label; its cross-entropy exceeds H(Y | X), so the difference is a lower bound that is tight where the classifier's
family holds the law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tinyalign.theory._input import as_labels, as_matrix, check_level
from tinyalign.theory.entropies import discrete_entropy
from tinyalign.theory.estimate import Estimate

__all__ = ["classifier_information"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_CARRIED = 20.0  # samples that carry the loss, and nats that it adds up to
_Fit = Callable[[FloatArray, IntArray, FloatArray, int], FloatArray]


def classifier_information(x: Any, labels: Any, *, folds: int = 5, level: float = 0.95, seed: int = 0) -> Estimate:
    """Bound I(X; Y) from below with linear, scaled, quadratic and logistic classifiers, scored on held-out folds.

    The best of the four by held-out cross-entropy is returned. Its excess over an infinite training set falls as 1/n
    and is extrapolated from training on half of each fold's training set.

    Args:
        x: features.
        labels: one label per sample.
        folds: number of folds.
        level: nominal coverage.
        seed: seed of the split.

    Shape:
        x: (n,) or (n, d). labels: (n,).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, fewer than two labels, or a label with fewer samples than folds.

    Source:
        Barber and Agakov 2003; cross-fitting as in Chernozhukov et al. 2018.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 2, 1000)
        >>> result = classifier_information(rng.normal(size=(1000, 3)) + 20 * labels[:, None], labels)
        >>> bool(abs(result.value - np.log(2)) < 0.01), result.kind
        (True, 'lower')
    """
    check_level(level, "classifier_information")
    points = as_matrix(x, "classifier_information", "x")
    codes = as_labels(labels, "classifier_information", "labels")
    if len(points) != len(codes):
        raise ValueError(
            f"classifier_information: x and labels must have equal lengths, got {len(points)} and {len(codes)}. "
            "Pair them row by row."
        )
    counts = np.bincount(codes)
    if len(counts) < 2 or counts.min() < 2 * folds:
        raise ValueError(
            f"classifier_information: every label must have at least {2 * folds} samples, with two labels at least, "
            f"got counts from {counts.min()} over {len(counts)} labels. Merge rare labels or lower folds."
        )
    spread = points.std(axis=0)
    points = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    n, classes = len(codes), len(counts)
    fold = _stratified(codes, folds, seed)
    losses = {name: _cross_fit(fit, points, codes, fold, classes, 1.0, seed) for name, fit in _FITS.items()}
    best = min(losses, key=lambda name: float(losses[name].mean()))
    loss = losses[best]
    half_trained = _cross_fit(_FITS[best], points, codes, fold, classes, 0.5, seed)
    # CE(m) = CE + c / m: twice the loss at m less the loss at m / 2, by record, as its noise is part of the error.
    excess = half_trained - loss if half_trained.mean() > loss.mean() else np.zeros(n)
    entropy = discrete_entropy(counts, "miller_madow")
    surprise = -np.log(counts / n)[codes]
    local = surprise - loss + excess + (entropy - float(surprise.mean()))
    value = float(local.mean())
    # The best of four, extrapolated: half of that step is taken to be its error.
    error = math.hypot(float(local.std(ddof=1)) / math.sqrt(n), 0.5 * float(excess.mean()))
    total = float(loss.sum())
    warnings: tuple[str, ...] = ()
    if total < _CARRIED or total**2 < _CARRIED * float((loss**2).sum()):
        warnings = (
            f"saturated: x nearly determines the label, and the loss of {total:.3g} nats over {n} samples rests on few "
            "of them; the interval does not hold errors too rare to be seen",
        )
    half = float(ndtri(0.5 + level / 2)) * error
    return Estimate(
        value,
        value - half,
        value + half,
        kind="lower",
        method=f"classifier ({best})",
        n=n,
        samples=local,
        candidates={f"classifier ({name})": entropy - float(item.mean()) for name, item in losses.items()},
        warnings=warnings,
        level=level,
        std_error=error,
        details={"folds": folds, "extrapolated": float(excess.mean())},
    )


def _stratified(codes: IntArray, folds: int, seed: int) -> IntArray:
    rng = np.random.default_rng(seed)
    fold = np.empty(len(codes), dtype=np.int64)
    for label in np.unique(codes):
        rows = rng.permutation(np.flatnonzero(codes == label))
        fold[rows] = (np.arange(len(rows)) + int(label)) % folds
    return fold


def _cross_fit(
    fit: _Fit, points: FloatArray, codes: IntArray, fold: IntArray, classes: int, share: float, seed: int
) -> FloatArray:
    """Held-out negative log-likelihood of every sample."""
    rng = np.random.default_rng(seed + 1)
    loss = np.empty(len(codes))
    for part in np.unique(fold):
        held = fold == part
        train = np.flatnonzero(~held)
        if share < 1.0:
            train = np.concatenate(
                [
                    rng.permutation(rows)[: max(2, int(share * len(rows)))]
                    for rows in (train[codes[train] == label] for label in range(classes))
                ]
            )
        logits = fit(points[train], codes[train], points[held], classes)
        logits -= logits.max(axis=1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        # A floor of one part in ten samples keeps a confident mistake from being infinite.
        floor = 1.0 / (10.0 * len(train))
        probs = (1 - floor) * np.exp(log_probs) + floor / classes
        loss[held] = -np.log(probs[np.arange(int(held.sum())), codes[held]])
    return loss


def _linear(train: FloatArray, codes: IntArray, test: FloatArray, classes: int) -> FloatArray:
    """Gaussian classes with one covariance."""
    means, priors, scatter = _moments(train, codes, classes)
    freedom = len(train) - classes
    covariance = scatter.sum(axis=0) / freedom
    precision = _precision(covariance)
    # The inverse of an estimated covariance is too large by this factor on average.
    precision *= max(0.05, (freedom - train.shape[1] - 1) / freedom)
    return np.asarray(test @ precision @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, precision, means) + priors)


def _quadratic(train: FloatArray, codes: IntArray, test: FloatArray, classes: int) -> FloatArray:
    """Gaussian classes, each with its own covariance drawn toward the common one."""
    means, priors, scatter = _moments(train, codes, classes)
    common = scatter.sum(axis=0) / (len(train) - classes)
    width = train.shape[1]
    logits = np.empty((len(test), classes))
    for label in range(classes):
        count = int((codes == label).sum())
        weight = count / (count + width)
        covariance = weight * scatter[label] / max(count - 1, 1) + (1 - weight) * common
        precision = _precision(covariance)
        centred = test - means[label]
        distance = np.einsum("nd,de,ne->n", centred, precision, centred)
        logits[:, label] = priors[label] + 0.5 * np.linalg.slogdet(precision)[1] - 0.5 * distance
    return logits


def _scaled(train: FloatArray, codes: IntArray, test: FloatArray, classes: int) -> FloatArray:
    """Gaussian classes with one covariance up to a factor each: it sees spread in many columns from few samples."""
    means, priors, scatter = _moments(train, codes, classes)
    width = train.shape[1]
    precision = _precision(scatter.sum(axis=0) / (len(train) - classes))
    logits = np.empty((len(test), classes))
    for label in range(classes):
        freedom = max(int((codes == label).sum()) - 1, 1)
        scale = max(float(np.einsum("de,de->", precision, scatter[label])) / (freedom * width), 1e-6)
        centred = test - means[label]
        distance = np.einsum("nd,nd->n", centred @ precision, centred) / scale
        logits[:, label] = priors[label] - 0.5 * width * math.log(scale) - 0.5 * distance
    return logits


def _logistic(train: FloatArray, codes: IntArray, test: FloatArray, classes: int) -> FloatArray:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1.0, max_iter=200, tol=1e-3).fit(train, codes)
    logits = np.asarray(model.decision_function(test), dtype=np.float64)
    return np.stack([np.zeros(len(test)), logits], axis=1) if classes == 2 else logits


def _moments(train: FloatArray, codes: IntArray, classes: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    means = np.stack([train[codes == label].mean(axis=0) for label in range(classes)])
    priors = np.log(np.bincount(codes, minlength=classes) / len(codes))
    scatter = np.stack([(train[codes == c] - means[c]).T @ (train[codes == c] - means[c]) for c in range(classes)])
    return means, priors, scatter


def _precision(covariance: FloatArray) -> FloatArray:
    ridge = 1e-6 * np.trace(covariance) / len(covariance) + 1e-12
    return np.asarray(np.linalg.inv(covariance + ridge * np.eye(len(covariance))))


_FITS: dict[str, _Fit] = {"linear": _linear, "scaled": _scaled, "quadratic": _quadratic, "logistic": _logistic}
