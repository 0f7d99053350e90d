"""The terminal side of a chat: lines in, streamed answers out, and the slash commands."""

import re
import sys
import time

from core.errors import UserError
from serving.session import ChatSession

HELP = """/lora NAME  switch to a skill      /lora off    back to the base
/lora A=0.7 B=0.3  mix skills      /loras       list the skills
/system TEXT  begin with it        /system off  begin with the question
/reset      forget the talk        /help        this list
/exit       leave (or Ctrl-D); Ctrl-C stops an answer. Any other line is a question."""
COMMANDS = ("/lora", "/loras", "/system", "/reset", "/help")


def chat(session: ChatSession) -> None:
    """Answer line by line until end of input or /exit. Works on a terminal and on a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while True:
        try:
            line = input(f"\n{session.skill or 'base'}> " if interactive else "").strip()
            line = line.removeprefix("\ufeff")  # some shells begin a pipe with a byte-order mark
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if line in ("/exit", "/quit"):
            return
        try:
            # A word of its own is a mistyped command; "/tmp is full" is a question.
            if line.partition(" ")[0].lower() in COMMANDS or re.fullmatch("/[a-zA-Z]+", line):
                command(session, line)
            elif line:
                answer(session, line)
        except UserError as error:  # a mistake inside a chat ends the line, not the session
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" (stopped)")


def answer(session: ChatSession, text: str) -> None:
    """Stream one answer to stdout; its speed goes to stderr, so that a pipe holds the answer."""
    began = time.perf_counter()
    for piece in session.reply(text):
        print(piece, end="", flush=True)
    print()
    speed = session.tokens / (time.perf_counter() - began)
    print(f"[{session.tokens} tokens, {speed:.1f} tokens/s]", file=sys.stderr)


def command(session: ChatSession, line: str) -> None:
    """Carry out one of ``COMMANDS``. Raises ``UserError`` for what it cannot do."""
    name, _, argument = line.partition(" ")
    name, argument = name.lower(), argument.strip()
    argument = "off" if argument.lower() == "off" else argument
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        session.messages.clear()
        print("conversation forgotten")
    elif name == "/loras":
        found = list(session.skills())
        for skill, reason in found:
            mark = "*" if skill in session.weights else " "
            print(f"{mark} {skill}" + (f"  unfit: {reason}" if reason else ""))
        if not found:
            print(f"no skills in {session.out_dir} yet")
    elif name == "/system":
        if argument:
            session.use_system(None if argument == "off" else argument)
        print(f"system: {session.system or 'off'}")
    elif name != "/lora":
        raise UserError(f"there is no command {name}; /help lists them")
    elif argument:
        session.use_skill(None if argument == "off" else argument)
        print(f"skill: {session.skill or 'off'}")
    else:
        raise UserError("/lora needs the name of a skill, or off; /loras lists them")
