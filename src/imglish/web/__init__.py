"""The search in a browser: a FastAPI application and one page. Needs the extra ``serve``; see ``imglish serve``."""
