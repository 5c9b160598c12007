"""``HistGradientBoostingClassifier`` and ``HistGradientBoostingRegressor``: scikit-learn's, with trees grown, updated and
predicted by the kernels of ``src/cpp/tree``, and trained across the processes of a ``torch.distributed`` group.

What is scikit-learn's stays scikit-learn's: parameters, validation, losses, scoring, early stopping, and the
``TreePredictor`` of each tree, so that ``to_sklearn()``, pickles and scikit-learn's own prediction work.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn import ensemble as _sklearn
from sklearn._loss.loss import BaseLoss
from sklearn.base import _fit_context
from sklearn.ensemble._hist_gradient_boosting import gradient_boosting as _reference
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils._openmp_helpers import _openmp_effective_n_threads
from sklearn.utils.validation import (
    _check_monotonic_cst,
    _check_sample_weight,
    _check_y,
    check_consistent_length,
    check_is_fitted,
)

from . import _distributed
from ._binning import BinMapper, empty_bins
from ._histogram_predict import BinnedForest, on_training_bins
from ._histogram_tree import GrowthLimits, HistogramGrower, make_predictor
from ._losses import gradients
from ._predict import SklearnMixin, cached_forest
from ._progress import progress_bar


class _Rows:
    """The rows of this process that are trained on, or kept for validation, in the order they are looked at.

    ``order`` numbers rows of all processes (None: all rows as they come), ``own`` those of this process among its own,
    ``positions`` where these are in ``order``.
    """

    def __init__(self, group: _distributed.Alone, order: np.ndarray | None) -> None:
        self.group, self.order = group, order
        self.total = group.all if order is None else len(order)
        self.positions = group.own_positions(order)
        if order is None:
            self.own = slice(None)
        else:
            self.own = (order if self.positions is None else order[self.positions]) - group.first

    def assemble(self, part: np.ndarray) -> np.ndarray:
        """These rows of all processes, from this process's part of them."""
        return self.group.assemble(part, self.positions, self.total)

    def part(self, assembled: np.ndarray | None) -> np.ndarray | None:
        return assembled if assembled is None or self.positions is None else assembled[self.positions]


class _HistGradientBoosting(SklearnMixin):
    """What both estimators do otherwise than scikit-learn's."""

    def to_sklearn(self):
        """The plain scikit-learn estimator with the same parameters and fitted state (trees are shared)."""
        plain = super().to_sklearn()
        if isinstance(getattr(plain, "_bin_mapper", None), BinMapper):
            plain._bin_mapper = plain._bin_mapper.to_sklearn()
        return plain

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None, sample_weight_val=None):
        """Fits the model.

        Inside an initialised ``torch.distributed`` group of several processes, each calls this with rows of its own and
        with the same parameters, and all get, bit for bit, the trees of one process that holds all rows, those of rank 0
        first. What depends on every row at once (targets, weights, the sample for the bins' edges; with early stopping
        also the predictions that are scored) is gathered on each process, the values of the features are not.
        Rows for validation that are given as X_val are the same on each, and each has one row to train on at least.
        :func:`fastnn.tree.local_fit` trains on the rows of one process inside a group.

        Sums of gradients and of hessians are of whole numbers, so that they depend neither on the order of the rows nor on
        who adds them: in units of about 2^-30 of the iteration's largest gradient and hessian where that is fine enough for
        the small ones, else of about 2^-61, which takes longer.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples; NaN is missing.
        y : array-like of shape (n_samples,)
            Targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights.
        X_val, y_val, sample_weight_val : array-likes, default=None
            Samples to stop early by, instead of a share of X.

        Returns
        -------
        self : object
        """
        group = _distributed.processes()
        started = time.perf_counter()
        X, y, sample_weight, known_categories, validation = self._read(
            group, X, y, sample_weight, X_val, y_val, sample_weight_val
        )
        X_val, y_val, sample_weight_val = validation if validation else (None, None, None)
        # From here on y and sample_weight are those of all processes, X is this process's.
        self._draw_seeds(group)
        self._validate_parameters()
        monotonic = _check_monotonic_cst(self, self.monotonic_cst)
        if self.is_categorical_ is not None:  # the preprocessor puts them first
            monotonic = np.concatenate((monotonic[self.is_categorical_], monotonic[~self.is_categorical_]))
        self._n_features = X.shape[1]
        interaction_cst = self._check_interaction_cst(self._n_features)
        threads = _openmp_effective_n_threads()
        self._loss = self.loss if isinstance(self.loss, BaseLoss) else self._get_loss(sample_weight=sample_weight)
        self.do_early_stopping_ = group.all > 10_000 if self.early_stopping == "auto" else self.early_stopping
        self._use_validation_data = self.validation_fraction is not None or validation is not None

        train, held_out = _Rows(group, None), None
        if self.do_early_stopping_ and self._use_validation_data and validation is None:
            order, kept = train_test_split(
                np.arange(group.all),
                test_size=self.validation_fraction,
                stratify=y if hasattr(self._loss, "predict_proba") else None,
                random_state=self._random_seed,
            )
            train, held_out = _Rows(group, order), _Rows(group, kept)
            y_val, y = y[kept], y[order]
            if sample_weight is not None:
                sample_weight_val, sample_weight = sample_weight[kept], sample_weight[order]

        self._in_fit = True  # _raw_predict is given bins
        try:
            binned = self._bin(X, train, sample_weight, known_categories, threads)
            if validation:
                binned_val = self._bin_mapper.transform(X_val)
            elif held_out:
                binned_val = binned[held_out.own]
            else:
                binned_val = None
            binned = _columns(binned, train.own)
            grower = HistogramGrower(
                binned,
                self._bin_mapper.n_bins_non_missing_,
                self._bin_mapper.missing_values_bin_idx_,
                categorical=self._is_categorical_remapped,
                monotonic=monotonic,
                interaction_cst=interaction_cst,
                max_features=self.max_features,
                rng=self._feature_subsample_rng,
                group=group,
            )
            self._boost(
                grower,
                train,
                y,
                sample_weight,
                _Scoring(
                    self, train, binned, y, sample_weight, held_out, binned_val, y_val, sample_weight_val, threads
                ),
                threads,
            )
        finally:
            del self._in_fit
        self.train_score_ = np.asarray(self.train_score_)
        self.validation_score_ = np.asarray(self.validation_score_)
        if self.verbose >= 2:
            leaves = sum(tree.get_n_leaf_nodes() for trees in self._predictors for tree in trees)
            count = sum(len(trees) for trees in self._predictors)
            print(f"Fit {count} trees in {time.perf_counter() - started:.3f} s, ({leaves} total leaves)")
        return self

    def _read(self, group, X, y, sample_weight, X_val, y_val, sample_weight_val):
        """Validates what fit is given; gathers targets and weights."""
        given = X
        with group.together():
            X, known_categories = self._preprocess_X(given, reset=True)
            y = _check_y(y, estimator=self)
            check_consistent_length(X, y)
            if sample_weight is not None:
                sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
                self._fitted_with_sw = True
        if group.size > 1:
            self._compare(group, X.shape[1], sample_weight is None, X_val is None)
            if self.is_categorical_ is not None:
                X, known_categories = self._know_all_categories(group, given, X)
        group.count(X.shape[0])
        y = self._encode_y(group.gather(y))
        if sample_weight is not None:
            sample_weight = group.gather(sample_weight)
        sample_weight = self._finalize_sample_weight(sample_weight, y)
        if X_val is None and y_val is None:
            return X, y, sample_weight, known_categories, None
        with group.together():
            if y_val is None:
                raise ValueError("X_val is provided, but y_val was not provided.")
            if X_val is None:
                raise ValueError("y_val is provided, but X_val was not provided.")
            X_val = self._preprocess_X(X_val, reset=False)
            y_val = self._encode_y_val(_check_y(y_val, estimator=self))
            check_consistent_length(X_val, y_val)
            if sample_weight_val is not None:
                sample_weight_val = _check_sample_weight(sample_weight_val, X_val, dtype=np.float64)
            if self.early_stopping is False:
                raise ValueError(
                    "X_val and y_val are passed to fit while at the same time early_stopping is False. When passing "
                    "X_val and y_val to fit,early_stopping should be set to either 'auto' or True."
                )
        return X, y, sample_weight, known_categories, (X_val, y_val, sample_weight_val)

    def _compare(self, group, features, no_weight, no_validation) -> None:
        """Raises in all processes where they were called otherwise."""
        known = (str, int, float, list, tuple, dict, type(None))
        parameters = {}
        for name, value in self.get_params(deep=False).items():
            value = value.item() if isinstance(value, np.generic) else value
            if name not in ("random_state", "verbose"):
                parameters[name] = value if isinstance(value, known) else type(value).__name__
        goes_on = self.warm_start and self._is_fitted()
        facts = {
            "number of features": features,
            "names of features": getattr(self, "feature_names_in_", np.empty(0)).tolist() or None,
            "categorical features": None if self.is_categorical_ is None else self.is_categorical_.tolist(),
            "sample_weight=None": no_weight,
            "X_val=None": no_validation,
            "parameters": repr(parameters),
            "iterations and seeds to go on with": (self.n_iter_, self._random_seed) if goes_on else None,
        }
        all_facts = group.each(facts)
        for rank, theirs in enumerate(all_facts):
            for name, value in theirs.items():
                if value != all_facts[0][name]:
                    raise ValueError(
                        f"fit across {group.size} processes: {name} differ: {all_facts[0][name]} on rank 0, {value} on "
                        f"rank {rank}"
                    )

    def _know_all_categories(self, group, given, X):
        """Encodes the categories that any process has."""
        # A row for each category of each column is enough to know them all. They come first in X.
        rows = {0}
        for column in range(int(np.sum(self._is_categorical_remapped))):
            rows.update(np.unique(X[:, column], return_index=True)[1].tolist())
        if not hasattr(given, "iloc"):
            some = np.concatenate(group.each(np.asarray(given)[sorted(rows)]))
        else:
            import pandas

            parts = group.each(given.iloc[sorted(rows)])
            some = pandas.concat(parts, ignore_index=True)
            for name in given.columns:  # columns of different categories have become objects
                if isinstance(given[name].dtype, pandas.CategoricalDtype):
                    merged = pandas.api.types.union_categoricals([part[name] for part in parts])
                    some[name] = pandas.Series(merged, index=some.index)
        _, known_categories = self._preprocess_X(some, reset=True)
        with group.together():
            return self._preprocess_X(given, reset=False), known_categories

    def _draw_seeds(self, group) -> None:
        # A warm start goes on with the split and the features of the first fit.
        if self.warm_start and self._is_fitted():
            return
        rng = check_random_state(self.random_state)
        seeds = [rng.randint(np.iinfo(np.uint32).max, dtype="u8") for _ in range(2)]
        self._random_seed, feature_seed = group.share(seeds)
        self._feature_subsample_rng = np.random.default_rng(feature_seed)

    def _bin(self, X, train, sample_weight, known_categories, threads):
        """Finds the edges from the rows to train on; the bins of all rows of this process."""
        group = train.group
        mapper = BinMapper(
            n_bins=self.max_bins + 1,
            is_categorical=self._is_categorical_remapped,
            known_categories=known_categories,
            random_state=self._random_seed,
            n_threads=threads,
        )
        self._bin_mapper = mapper
        sample, weight = mapper.draw(train.total, sample_weight)
        # Rows of all processes, in the order of the draw.
        rows = sample if train.order is None else train.order if sample is None else train.order[sample]
        if group.size > 1:
            looked_at = _Rows(group, rows)
            mapper.fit_sample(looked_at.assemble(X[looked_at.own]), None, weight)
        elif rows is not None and weight is not None:
            mapper.fit_sample(X[rows], None, weight)
        else:
            mapper.fit_sample(X, rows, weight)
        return mapper.transform(X)

    def _boost(self, grower, train, y, sample_weight, scoring, threads) -> None:
        """Adds trees until there are ``max_iter``, or the score does not rise any more."""
        limits = GrowthLimits(
            max_leaf_nodes=self.max_leaf_nodes,
            max_depth=self.max_depth,
            min_samples_leaf=self.min_samples_leaf,
            l2_regularization=self.l2_regularization,
            shrinkage=self.learning_rate,
        )
        mapper = self._bin_mapper
        if not (self._is_fitted() and self.warm_start):
            self._clear_state()
            self._baseline_prediction = self._loss.fit_intercept_only(y_true=y, sample_weight=sample_weight).reshape(
                (1, -1)
            )
            shape = (grower.rows, self.n_trees_per_iteration_)
            raw = np.zeros(shape, dtype=self._baseline_prediction.dtype, order="F")
            raw += self._baseline_prediction
            self._predictors = []
            self._scorer = None
            self.train_score_, self.validation_score_ = [], []
            scoring.start(raw)
        else:
            if self.max_iter < self.n_iter_:
                raise ValueError(
                    f"max_iter={self.max_iter} must be larger than or equal to n_iter_={self.n_iter_} when "
                    "warm_start==True"
                )
            self.train_score_ = self.train_score_.tolist()
            self.validation_score_ = self.validation_score_.tolist()
            raw = self._raw_predict(grower.binned, n_threads=threads)
            scoring.resume(raw)
        own_y, own_weight = train.part(y), train.part(sample_weight)
        gradient, hessian = self._loss.init_gradient_and_hessian(n_samples=grower.rows, dtype=np.float32, order="F")
        constant = self._loss.constant_hessian
        iterations = range(len(self._predictors), self.max_iter)
        if self.verbose == 1:
            iterations = progress_bar(type(self).__name__, iterations, total=self.max_iter, begin=iterations.start)
        for iteration in iterations:
            began = time.perf_counter()
            if grower.rows:
                gradients(self._loss, own_y, raw, own_weight, gradient, None if constant else hessian, threads)
            self._predictors.append([])
            for k in range(self.n_trees_per_iteration_):
                g = gradient if gradient.ndim == 1 else gradient[:, k]
                h = None if constant else hessian if hessian.ndim == 1 else hessian[:, k]
                nodes = grower.grow(g, h, limits)
                if not self._loss.differentiable:
                    self._update_leaves(grower, nodes, train, y, raw[:, k], sample_weight)
                self._predictors[-1].append(make_predictor(nodes, mapper.bin_thresholds_, mapper.n_bins_non_missing_))
                grower.add_values(nodes, raw[:, k])
            stop = scoring.add(raw)
            if self.verbose >= 2:
                print(f"[{iteration + 1}/{self.max_iter}] ", end="", flush=True)
                self._print_iteration_stats(time.time() - (time.perf_counter() - began))
            if stop:
                break

    def _binned_forest(self, iterations) -> BinnedForest:
        known = self._bin_mapper.bin_thresholds_
        categories = [len(e) if c else 0 for e, c in zip(known, self._bin_mapper.is_categorical_.tolist(), strict=True)]
        made_of = [
            array for iteration in iterations for tree in iteration for array in (tree.nodes, tree.raw_left_cat_bitsets)
        ]
        return cached_forest(self, made_of, lambda: BinnedForest(iterations, np.array(categories)))

    def _predict_iterations(self, X, predictors, raw_predictions, is_binned, n_threads):
        """Adds the predictions of lists of predictors, one list an iteration."""
        if not predictors or not len(X):
            return
        if is_binned:
            missing = self._bin_mapper.missing_values_bin_idx_
            for iteration in predictors:
                forest = on_training_bins(iteration, X.shape[1], missing)
                out = np.ascontiguousarray(raw_predictions)
                forest.predict(X, out=out)
                if out is not raw_predictions:
                    raw_predictions[:] = out
            return
        forest = self._binned_forest(predictors)
        if forest.fits:
            forest.add(forest.bins(X), raw_predictions)
        else:
            super()._predict_iterations(X, predictors, raw_predictions, is_binned, n_threads)

    def _staged_raw_predict(self, X):
        """As scikit-learn's; values are binned once, and the forest of all trees is made once."""
        check_is_fitted(self)
        forest = self._binned_forest(self._predictors)
        if not forest.fits:
            yield from super()._staged_raw_predict(X)
            return
        binned = forest.bins(self._preprocess_X(X, reset=False))
        trees = self.n_trees_per_iteration_
        raw = np.tile(self._baseline_prediction, (len(binned), 1))
        for iteration in range(len(self._predictors)):
            forest.add(binned, raw, (iteration * trees, (iteration + 1) * trees))
            yield raw.copy()

    def _update_leaves(self, grower, nodes, train, y, raw, sample_weight) -> None:
        """Values of the leaves under a loss that has no second derivative: what minimises it over each leaf's rows."""
        leaf = train.assemble(grower.leaf_of_rows(nodes))
        residual = y - train.assemble(np.ascontiguousarray(raw))
        order = np.argsort(leaf, kind="stable")
        bounds = np.searchsorted(leaf[order], np.arange(len(nodes) + 1))
        for node in np.flatnonzero(nodes["leaf"]):
            rows = order[bounds[node] : bounds[node + 1]]
            update = self._loss.fit_intercept_only(
                y_true=residual[rows], sample_weight=None if sample_weight is None else sample_weight[rows]
            )
            nodes["value"][node] = self.learning_rate * update


def _columns(binned: np.ndarray, rows) -> np.ndarray:
    """Rows of bins in Fortran order, with bytes to spare behind the last."""
    if isinstance(rows, slice):
        return binned
    out = empty_bins(len(rows), binned.shape[1])
    for f in range(binned.shape[1]):
        np.take(binned[:, f], rows, out=out[:, f])
    return out


class _Scoring:
    """The scores of early stopping, by scikit-learn's own methods, on rows of all processes."""

    def __init__(self, estimator, train, binned, y, weight, held_out, binned_val, y_val, weight_val, threads) -> None:
        self.estimator, self.threads = estimator, threads
        self.on = estimator.do_early_stopping_
        if not self.on:
            return
        self.train, self.binned, self.y, self.weight = train, binned, y, weight
        self.held_out, self.binned_val, self.y_val, self.weight_val = held_out, binned_val, y_val, weight_val
        self.by_loss = estimator.scoring == "loss"
        self.by_name = not callable(estimator.scoring) and estimator.scoring in _reference._SCORERS
        self.raw_val = None

    def start(self, raw: np.ndarray) -> None:
        """Before the first tree."""
        if not self.on:
            return
        e = self.estimator
        if self.binned_val is not None and (self.by_loss or self.by_name):
            self.raw_val = np.zeros((len(self.binned_val), raw.shape[1]), dtype=raw.dtype, order="F")
            self.raw_val += e._baseline_prediction
        if not self.by_loss:
            e._scorer = _reference.check_scoring(e, e.scoring)
        self._prepare()
        self._score(raw)

    def resume(self, raw: np.ndarray) -> None:
        """After trees of an earlier fit."""
        if not self.on:
            return
        if self.binned_val is not None and (self.by_loss or self.by_name):
            self.raw_val = self.estimator._raw_predict(self.binned_val, n_threads=self.threads)
        self._prepare()

    def add(self, raw: np.ndarray) -> bool:
        """After the newest trees: whether to stop."""
        if not self.on:
            return False
        e = self.estimator
        if self.raw_val is not None:
            e._predict_iterations(self.binned_val, e._predictors[-1:], self.raw_val, True, self.threads)
        return self._score(raw)

    def _of_validation(self, part):
        return part if part is None or self.held_out is None else self.held_out.assemble(part)

    def _prepare(self) -> None:
        if self.by_loss:
            return
        rows = np.arange(self.train.total)
        # scikit-learn draws from an array of rows; here it holds their numbers.
        small, self.y_small, self.weight_small, self.indices = self.estimator._get_small_trainset(
            rows.reshape(-1, 1), self.y, self.weight, self.estimator._random_seed
        )
        if self.by_name:  # scored by predictions that are known already
            self.small, self.val = small, self.y_val
        else:
            wanted = small.reshape(-1)
            if self.train.group.size == 1:
                self.small = np.ascontiguousarray(self.binned[wanted])
            else:
                order = np.arange(self.train.total) if self.train.order is None else self.train.order
                chosen = _Rows(self.train.group, order[wanted])
                lookup = np.full(self.train.group.all, -1)
                lookup[order[self.train.positions]] = np.arange(len(self.binned))
                self.small = chosen.assemble(self.binned[lookup[chosen.own + self.train.group.first]])
            self.val = self._of_validation(self.binned_val)

    def _score(self, raw: np.ndarray) -> bool:
        e = self.estimator
        raw_all = self.train.assemble(raw) if self.by_loss or self.by_name else None
        raw_val = self._of_validation(self.raw_val)
        if self.by_loss:
            return e._check_early_stopping_loss(
                raw_predictions=raw_all,
                y_train=self.y,
                sample_weight_train=self.weight,
                raw_predictions_val=raw_val,
                y_val=self.y_val,
                sample_weight_val=self.weight_val,
                n_threads=self.threads,
            )
        return e._check_early_stopping_scorer(
            self.small,
            self.y_small,
            self.weight_small,
            self.val,
            self.y_val,
            self.weight_val,
            raw_predictions_small_train=raw_all[self.indices] if self.by_name else None,
            raw_predictions_val=raw_val if self.by_name else None,
        )


class HistGradientBoostingClassifier(_HistGradientBoosting, _sklearn.HistGradientBoostingClassifier):
    __doc__ = _sklearn.HistGradientBoostingClassifier.__doc__


class HistGradientBoostingRegressor(_HistGradientBoosting, _sklearn.HistGradientBoostingRegressor):
    __doc__ = _sklearn.HistGradientBoostingRegressor.__doc__
