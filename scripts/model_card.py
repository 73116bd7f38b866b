"""Write MODEL_CARD.md, the card of all networks.

python -m scripts.model_card
"""

from pathlib import Path

from timm_nf.hub import card

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "MODEL_CARD.md"


def main() -> None:
    PAGE.write_text(card.zoo(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
