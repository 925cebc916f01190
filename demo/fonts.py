"""The fonts of the demo: free fonts from Debian's packages, unpacked but not installed, and split by package.

    python -m enat.demo.fonts --out work/fonts        # needs apt-get and dpkg (any Debian or Ubuntu)

writes the font files and `fonts.tsv`: one line a file, with family, package, licences and the half of the split that it belongs to.
A copy of that list is kept beside this file.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import ImageFont

CLASSES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

# Fonts for training the tokenizer, the network and the classifier.
TRAINING_PACKAGES = """
fonts-3270 fonts-agave fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius
fonts-adf-irianis fonts-adf-mekanus fonts-adf-romande fonts-adf-switzera fonts-adf-tribun fonts-adf-universalis fonts-adf-verana
fonts-allerta fonts-anonymous-pro fonts-arapey fonts-arkpandora fonts-arundina fonts-atarismall fonts-averia-gwf
fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-b612 fonts-bebas-neue fonts-beteckna fonts-breip fonts-cabin fonts-cabinsketch
fonts-cardo fonts-century-catalogue fonts-clear-sans fonts-cmu fonts-comic-neue fonts-compagnon fonts-crosextra-caladea
fonts-crosextra-carlito fonts-dancingscript fonts-dejavu-core fonts-dejavu-extra fonts-dosis fonts-dustin fonts-elstob
fonts-engadget fonts-essays1743 fonts-eurofurence fonts-fantasque-sans fonts-fanwood fonts-ferrite-core fonts-firacode
fonts-freefont-ttf fonts-gemunu-libre fonts-georgewilliams fonts-gfs-artemisia fonts-gfs-didot fonts-gfs-neohellenic
fonts-gnutypewriter fonts-go fonts-hack fonts-hermit fonts-humor-sans fonts-inconsolata fonts-inter fonts-johnsmith-induni
fonts-junction fonts-junicode fonts-karmilla fonts-kaushanscript fonts-klaudia-berenika fonts-lato fonts-le-murmure
fonts-league-mono fonts-league-spartan fonts-leckerli-one fonts-levien-typoscript fonts-liberation fonts-lindenhill fonts-linex
fonts-linuxlibertine fonts-lmodern fonts-lobstertwo fonts-manrope fonts-millimetre fonts-monofur fonts-monoid fonts-mplus
fonts-nanum fonts-noto-core fonts-noto-mono fonts-ocr-a fonts-ocr-b fonts-okolaks fonts-oldstandard fonts-open-sans
fonts-opendyslexic fonts-osifont fonts-oxygen fonts-paratype fonts-prociono fonts-quattrocento fonts-quicksand fonts-roadgeek
fonts-roboto-hinted fonts-routed-gothic fonts-rufscript fonts-sil-andika fonts-sil-charis fonts-sil-doulos fonts-sil-gentium
fonts-sil-gentiumplus fonts-smiley-sans fonts-solide-mirage fonts-sora fonts-stix fonts-texgyre fonts-tiresias
fonts-tlwg-garuda-ttf fonts-tlwg-kinnari-ttf fonts-tlwg-laksaman-ttf fonts-tlwg-loma-ttf fonts-tlwg-mono-ttf
fonts-tlwg-norasi-ttf fonts-tlwg-purisa-ttf fonts-tlwg-sawasdee-ttf fonts-tlwg-typewriter-ttf fonts-tlwg-typist-ttf
fonts-tlwg-typo-ttf fonts-tlwg-umpush-ttf fonts-tlwg-waree-ttf fonts-tomsontalks fonts-train fonts-tuffy fonts-urw-base35
fonts-woowa-bm fonts-yrsa-rasa fonts-yusei-magic
""".split()

# Fonts that nothing is trained on. Chosen so that none is a variant or a clone of one above.
HELD_OUT_PACKAGES = """
fonts-adf-libris fonts-cantarell fonts-cherrybomb fonts-comfortaa fonts-courier-prime fonts-ebgaramond fonts-goudybookletter
fonts-jetbrains-mono fonts-jura fonts-karla fonts-lemonada fonts-mononoki fonts-national-park fonts-opendin fonts-play
fonts-roboto-slab fonts-staypuft fonts-summersby fonts-vollkorn fonts-yanone-kaffeesatz
""".split()

# Families whose capitals or digits are not letters of the Latin alphabet, are drawn as small letters, or that nobody can read.
EXCLUDED_FAMILIES = re.compile(
    r"Abecedario|Alfa-beta|D050000L|Ellhnikh|Elegante|Delphine|Ecolier|El Abogado|BM Euljiro ora|Keyboard|Museum|Symbols"
    r"|Penguin|Radis|Steve|Junkyard|Script Std|Wargames|Math|Emoji|Nushu"
)
FILES_PER_FAMILY = 4


@dataclass(frozen=True)
class Font:
    path: str  # relative to the folder of the list
    family: str
    package: str
    licences: str
    split: str  # "train" or "held-out"


def read_fonts(folder: Path) -> list[Font]:
    with (folder / "fonts.tsv").open(newline="") as file:
        return [Font(**row) for row in csv.DictReader(file, delimiter="\t")]


def unpack(package: str, out: Path) -> Path:
    """Fetches a Debian package with apt and unpacks it below `out`, without installing it."""
    target = out / package
    if not target.exists():
        archives = out / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=archives, check=True)
        archive = next(archives.glob(f"{package}_*.deb"))
        partial = out / f"{package}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
        partial.rename(target)
    return target


# For packages whose copyright file is not machine-readable.
PHRASES = {
    r"Open\s+Font\s+Licen[sc]e": "OFL",
    r"GNU\s+(Lesser\s+)?General\s+Public\s+License": "GPL",
    r"Apache\s+License": "Apache",
    r"LaTeX\s+Project\s+Public": "LPPL",
    r"GUST\s+Font": "GUST Font License",
    r"public\s+domain": "public domain",
    r"Creative\s+Commons": "Creative Commons",
    r"Permission is hereby granted, free of charge": "MIT",
}


def licences(package_folder: Path) -> str:
    """The licence names in a package's copyright file, without those of the packaging where they can be told apart."""
    text = "".join(file.read_text(errors="replace") for file in sorted(package_folder.glob("usr/share/doc/*/copyright")))
    text = re.sub(r"(?ms)^Files: *debian/\*.*?(?=^\s*$)", "", text)
    names = [name.strip() for name in re.findall(r"(?m)^License: *(\S.*)$", text)]
    names = names or [name for phrase, name in PHRASES.items() if re.search(phrase, text, re.IGNORECASE)]
    return ", ".join(dict.fromkeys(names)) or "see the package's copyright file"


def family_of(path: Path) -> str | None:
    """The family's name, or None where the font does not hold every class as a picture of its own."""
    try:
        font = ImageFont.truetype(str(path), 48)
        masks = [font.getmask(letter) for letter in CLASSES]
    except OSError:
        return None
    drawn = {(mask.size, bytes(mask)) for mask in masks if all(mask.size)}
    # Two may look alike (O and 0, I and 1); boxes for missing letters would all do.
    return font.getname()[0] if len(drawn) >= len(CLASSES) - 2 else None


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the fonts and their list.")
def main(out: Path) -> None:
    """Fetch the demo's fonts and write the list of them."""
    fonts: list[Font] = []
    for split, packages in (("train", TRAINING_PACKAGES), ("held-out", HELD_OUT_PACKAGES)):
        families: dict[str, int] = defaultdict(int)
        for package in packages:
            folder = unpack(package, out)
            for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf") and not p.is_symlink()):
                family = family_of(path)
                if family is None or EXCLUDED_FAMILIES.search(family) or families[family] == FILES_PER_FAMILY:
                    continue
                families[family] += 1
                fonts.append(Font(str(path.relative_to(out)), family, package, licences(folder), split))
        click.echo(f"{split}: {len(families)} families, {sum(families.values())} fonts")
    with (out / "fonts.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Font.__annotations__), delimiter="\t")
        writer.writeheader()
        writer.writerows(vars(font) for font in fonts)


if __name__ == "__main__":
    main()
