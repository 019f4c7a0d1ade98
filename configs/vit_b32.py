from vit_convert.config import default_config
def get_config():
    c=default_config(); c.precision="fp16,int8"; c.variant="B/32"; return c
