"""How a cache is made: a teacher scores a corpus once. Nothing heavy is imported here."""
