"""Which language a text is in, by the library py3langid, whose model comes with its package.

Asked of the first, the middle and the last 200 characters: more does not change the answer and costs time.
"""

from __future__ import annotations

SAMPLE_CHARS = 200
SURE = 0.5  # below this share of certainty the language is "und", undetermined


class Languages:
    """Holds the model, about 100 MB."""

    def __init__(self) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise ValueError(
                "data.clean.identify_languages=true needs the package py3langid; "
                "pip install 'abyssal[data]', or set it to false"
            ) from None
        self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self.known = frozenset(self._model.labels)

    def of(self, text: str) -> str:
        """An ISO 639 code; "zxx" for what is no language, "und" when it cannot be told."""
        k, middle = SAMPLE_CHARS, len(text) // 2
        if len(text) > 3 * k:
            text = f"{text[:k]} {text[middle : middle + k]} {text[-k:]}"
        language, certainty = self._model.classify(text)
        return str(language) if certainty >= SURE else "und"
