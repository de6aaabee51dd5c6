"""Texts that hold a secret, and the secret: it must not be shown anywhere."""

SECRETS = (
    ("https://user:hunter22@e.example/model", "hunter22"),
    ("https://hf_abcdefghijkLMNOPQ@e.example/model", "hf_abcdefghijkLMNOPQ"),
    ("org/model?token=abc123secret", "abc123secret"),
    ("s3://bucket/x?X-Amz-Signature=deadbeef99&y=1", "deadbeef99"),
    ("https://e.example/m?access_key=AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("model hf_AbCdEfGhIjKlMnOpQrSt", "hf_AbCdEfGhIjKlMnOpQrSt"),
    ("ghp_0123456789abcdefghij", "ghp_0123456789abcdefghij"),
    ("Authorization: Bearer abcdefghijklmnop123", "abcdefghijklmnop123"),
    ("https://e.example/m#api_key=zzz999yyy", "zzz999yyy"),
)
