"""Text in, text out: ``glm`` (the class ``GLM``, ``load``), ``engine``, ``cache``, ``sampling``, ``beam``, ``results``."""
