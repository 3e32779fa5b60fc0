"""What several tests use. Tests import from here, never from another test or from conftest."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
