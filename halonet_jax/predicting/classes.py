"""Classifiers: the classes of an image, and pictures of what the model attends to."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from halonet_jax import attention_maps, data
from halonet_jax.errors import ConfigError
from halonet_jax.predicting.results import Prediction
from halonet_jax.predicting.running import PictureFolder
from halonet_jax.predicting.writers import ClassLayout
from halonet_jax.runtime import plots
from halonet_jax.weights import Loaded

DEFAULT_TOP = 5
_AUTOMATIC_PLACES = 2


class Classes:
    """See `running.Kind`.

    Args:
        loaded: the model.
        top: classes per image; at most all of the model's are given.
        draw: makes attention pictures; None: there are none.

    Attributes:
        transform: as in evaluation.
        layout: how results look.
    """

    def __init__(self, loaded: Loaded, top: int, draw: "AttentionPictures | None"):
        self._names, self._task, self._draw = loaded.metadata["class_names"], loaded.task, draw
        self._top = min(top, len(self._names))
        self.layout = ClassLayout(self._top, draw is not None)
        self.transform = data.ClassificationTransform(
            loaded.config.data, num_classes=len(self._names), training=False, upright=True
        )

    def outputs(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns probabilities and classes, `[B, top]`, and the images where pictures are drawn."""
        logits = self._task.predict(params, batch_stats, {"image": batch["image"]})
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), self._top)
        return {"probabilities": probabilities, "classes": classes} | ({"image": batch["image"]} if self._draw else {})

    def result(self, number: int, name: str, values: dict[str, np.ndarray]) -> Prediction:
        """Returns the prediction of one image, and draws its picture."""
        found = tuple((self._names[n], float(p)) for n, p in zip(values["classes"], values["probabilities"]))
        picture = self._draw(number, name, values["image"], found[0]) if self._draw else ""
        return Prediction(name, found, attention=picture)

    def broken(self, name: str, reason: str) -> Prediction:
        """Returns the prediction that stands for a broken file."""
        return Prediction(name, error=reason)


class AttentionPictures:
    """Draws an attention picture per image.

    Args:
        loaded: the model.
        make_folder: makes the folder for the pictures, once it is sure that there will be some.
        places: queries, (row, column) as shares of the crop; none: where the model's map is strongest.
        heads: whether to draw each head.

    Raises:
        ConfigError: the model has no attention, or is none of `halonet_jax.models`.
    """

    def __init__(
        self, loaded: Loaded, make_folder: Callable[[], PictureFolder], places: Sequence[tuple[float, float]], heads: bool
    ):
        self._capture = attention_maps.Capture(loaded)
        if not loaded.model.backbone.attention_layers(32, 32):
            raise ConfigError(f"{loaded.folder} is a model of convolutions, without attention to draw; leave --attention out")
        self._folder, self._places, self._heads = make_folder(), places, heads

    def __call__(self, number: int, name: str, image: np.ndarray, best: tuple[str, float]) -> str:
        """Draws one picture and returns its path.

        Args:
            number: of the image among the files.
            name: path of its file.
            image: uint8 [H, W, 3], as the model saw it.
            best: class name and probability.
        """
        captured = self._capture(image)
        rows = []
        for place in self._places or captured.strongest(_AUTOMATIC_PLACES):
            seen = [(layer.layer, layer.at(*place)) for layer in captured.by_stage()]
            rows.append([plots.AttentionPanel(f"stage {about.stage}", s.weights.mean(0), *s[1:]) for about, s in seen])
            for head in range(max(about.num_heads for about, _ in seen) if self._heads else 0):
                rows.append(
                    [
                        plots.AttentionPanel(f"stage {about.stage}, head {head + 1}", s.weights[head], *s[1:])
                        if head < about.num_heads
                        else None
                        for about, s in seen
                    ]
                )
        path = self._folder.file(number, name)
        plots.attention(image, rows, f"{best[0]}  {best[1]:.1%}", path)
        return str(path)
