"""Names of the models that this package carries itself. Importing this module imports no library."""

# `load_pipeline` loads the embedded miniature by this name; a folder of the same name is "./miniature".
MINIATURE = "miniature"
