"""What several tests share: small networks, the reference, the stand-in Hub, files in the authors' form."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
