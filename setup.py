"""What pyproject.toml has no words for: the wheel takes the lessons' pictures along.

The pictures stand in images/, beside the scripts that draw them; a lesson that runs from the
installed package, as on Colab, finds them in course_lib/images.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPictures(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # else they are found where they are
            folder = Path(self.build_lib) / "course_lib" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            for picture in Path("images").glob("*.png"):
                shutil.copy(picture, folder)


setup(cmdclass={"build_py": BuildWithPictures})
