"""Record the picture of chapter 4's schedule for machines whose compiler does not show one.

python tools/record_occupancy.py     # needs libtpu; writes rpa/data/flash_occupancy_v5e.*
"""

from rpa.figures.tiled import RECORDED, block_occupancy


def main() -> None:
    """Compile, draw, write the picture and its words."""
    picture = block_occupancy("v5e")
    picture.save(RECORDED, dpi=110)
    RECORDED.with_suffix(".txt").write_text(picture.text + "\n", encoding="utf-8")
    print(picture)


if __name__ == "__main__":
    main()
