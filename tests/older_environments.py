"""Make virtual environments with older versions of diffusers, transformers and peft, for the tests of saved files.

    python tests/older_environments.py FOLDER

It takes a minute and 150 MB: torch and all other packages come from the environment of the interpreter that runs it. It
prints the variable that the slow tests read, which names the interpreters:

    D2F_OLDER_PYTHONS=FOLDER/0.31.0/bin/python:FOLDER/0.32.1/bin/python:FOLDER/0.35.1/bin/python pytest -m slow tests
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# Packages beside each version of diffusers: those that were the newest when it came out.
ENVIRONMENTS = {
    "0.31.0": "transformers==4.46.3 tokenizers==0.20.3 huggingface-hub==0.26.5 peft==0.13.2 accelerate==1.1.1",
    "0.32.1": "transformers==4.46.3 tokenizers==0.20.3 huggingface-hub==0.26.5 peft==0.14.0 accelerate==1.2.1",
    "0.35.1": "transformers==4.56.2 tokenizers==0.22.1 huggingface-hub==0.35.3 peft==0.17.1 accelerate==1.10.1",
}


def main() -> None:
    (folder,) = map(Path, sys.argv[1:])
    interpreters = []
    for diffusers, others in ENVIRONMENTS.items():
        environment = folder.resolve() / diffusers
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin/python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"diffusers=={diffusers}", *others.split()]
        subprocess.run(install, check=True)
        # A path in this file comes after the environment's own packages.
        (site_packages,) = environment.glob("lib/python*/site-packages")
        (site_packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        interpreters.append(str(python))
    print(f"D2F_OLDER_PYTHONS={os.pathsep.join(interpreters)}")


if __name__ == "__main__":
    main()
