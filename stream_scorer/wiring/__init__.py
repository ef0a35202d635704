"""The composition root: the only room that knows all names. ``build.py`` turns settings into running parts."""
