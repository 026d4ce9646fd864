-- limit_settle: requests are over; their streams are free, their tokens are counted as they were.
--
-- KEYS  1 to 11 as _meter says
-- ARGV  1 the meter's name  then per ticket: ticket, tokens it took in all, tokens of its answer
--       ('': unknown, as reserved; tokens -1: it was never asked, all of it comes back, its place before the line, too)
-- Returns {settled, waiting, ms until it is worth asking (-1: nobody waits)}
-- Too much reserved comes back to the slot it was taken from; too little is a debt that counts from now on.
-- A lost reply may be retried: a ticket is settled once.
-- flags: allow-oom
-- uses: _meter

open_meter()
local settled = 0
for i = 2, #ARGV, 3 do
  local ticket, took, answer = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local record = call('HGET', HELD, ticket)
  if took and took < 0 then
    call('ZREM', FRONT, ticket)
  end
  if record then
    local lane, at, reserved = string.match(record, '(%d+):(%d+):(%d+)')
    lane, at, reserved = tonumber(lane), tonumber(at), tonumber(reserved)
    call('HDEL', HELD, ticket)
    call('ZREM', TICKETS, ticket)
    m.holding = m.holding - lane
    settled = settled + 1
    if took and took < 0 then
      count(at, lane, -1, -reserved)
    elseif took and took < reserved then
      count(at, lane, 0, took - reserved)
    elseif took and took > reserved and at > 0 then
      count(slot, lane, 0, took - reserved)
    end
    if answer then
      m.samples = min(m.samples + 1, 1000)
      local weight = max(1 / m.samples, 0.05)
      local off = answer - m.mean
      m.mean = m.mean + weight * off
      m.deviation = m.deviation + weight * (math.abs(off) - m.deviation)
      call('HSET', METER, 'samples', int(m.samples), 'mean', string.format('%.1f', m.mean), 'deviation',
        string.format('%.1f', m.deviation))
    end
  end
end
save_meter()
local waiting = call('ZCARD', LINES[0]) + call('ZCARD', LINES[1])
local wait = -1
if waiting > 0 then
  wait = max(0, tonumber(call('ZSCORE', WAITING, ARGV[1]) or now) - now)
  if settled > 0 and m.cooling <= now then -- what came back may be enough for the next
    wait = 0
    call('ZADD', WAITING, now, ARGV[1])
  end
end
return {settled, waiting, wait}
