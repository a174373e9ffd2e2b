// Looks again and again, and at once when told so. Of several looks under way only the last one counts.

export class Watch {
  // look: gets what is shown; show: shows it; failed: gets the error, and says whether to look again.
  constructor(look, show, failed, seconds) {
    Object.assign(this, { look, show, failed, seconds });
    this.turn = 0;
    document.addEventListener("visibilitychange", () => document.hidden || this.now());
  }

  async now() {
    clearTimeout(this.timer);
    const turn = ++this.turn;
    const result = await this.look().then(
      (found) => () => this.show(found) ?? true,
      (error) => () => this.failed(error),
    );
    if (turn !== this.turn) return;
    if (result() && !document.hidden) this.timer = setTimeout(() => this.now(), 1000 * this.seconds);
  }
}
