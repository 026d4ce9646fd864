-- sweep: of the jobs that are due, find those nobody works on; they are to be delivered again by the caller.
--
-- KEYS  1 open  2 ended  3 repack  then per job: state, log, spec, the line it waits in (any name where it is in none)
-- ARGV  1 lease (ms)  2 patience (ms)  3 number of lanes, then per lane: its name and since when the first delivery in it
--       has its place (the job's `queued`, else its `created`, ms; '' for an empty lane)  then per job: its id
-- Returns {id, lane, 'lost' | 'vanished' | 'due'} per job to deliver, the youngest first: see deliver, where the due ones
-- stand last and the others first. Each is rescored as it is taken, so that several sweeps at once take different jobs.
-- A lost lease is told at once. Afterwards, and of a queued job, the delivery is taken for gone only when the first in
-- its lane has its place since later: a backlog is no loss. Nor has one vanished that stands in the line of a limit: a
-- worker takes it from there.
-- flags: allow-oom
-- uses: _ending

local now = server_ms()
local lease, patience, lanes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local oldest = {}
for i = 1, lanes do
  oldest[ARGV[2 + 2 * i]] = tonumber(ARGV[3 + 2 * i])
end

-- Whether a delivery that has its place since then may still be waiting.
local function waits(lane, since)
  return oldest[lane] and oldest[lane] <= since
end

local function look(id, state, log, spec, line)
  local score = redis.call('ZSCORE', KEYS[1], id)
  if not score or tonumber(score) > now then
    return nil -- another sweep took it
  end
  local s = redis.call('HMGET', state, 'status', 'lane', 'lease', 'not_before', 'expires', 'attempt', 'seq', 'created',
    'place', 'swept', 'queued')
  if not s[1] or CLOSED[s[1]] then
    redis.call('ZREM', KEYS[1], id)
    return nil
  end
  local created = tonumber(s[8])
  assert(s[2] and created, 'its state is incomplete')
  local in_line = s[9] and redis.call('ZSCORE', line, s[9])
  if s[1] == 'in_progress' then
    local ends = s[3] or '0'
    local left = tonumber(ends) - now
    redis.call('ZADD', KEYS[1], now + (left > 0 and left or lease), id)
    if left > 0 or in_line or (s[10] == ends and waits(s[2], created)) then
      return nil
    end
    redis.call('HSET', state, 'swept', ends)
    return {id, s[2], 'lost', created}
  end
  if s[5] and s[6] == '0' and tonumber(s[5]) <= now then
    local failure = '{"code":"expired","message":"it was not started before its expiry"}'
    redis.call('HSET', state, 'error', failure)
    end_job({id, state, log, spec}, KEYS[1], KEYS[2], KEYS[3], now, s[7] + 1, s[6], 'failed',
      '{"type":"failed","finish_reasons":{},"error":' .. failure .. '}', '')
    return nil
  end
  if s[4] then
    local left = tonumber(s[4]) - now
    redis.call('ZADD', KEYS[1], now + (left > 0 and left or patience), id)
    if left > 0 then
      return nil
    end
    redis.call('HDEL', state, 'not_before', 'wait') -- from here on it waits in its lane, like any other
    redis.call('HSET', state, 'queued', now)
    return {id, s[2], 'due', created}
  end
  redis.call('ZADD', KEYS[1], now + patience, id)
  if in_line or waits(s[2], tonumber(s[11]) or created) then
    return nil
  end
  redis.call('HDEL', state, 'queued')
  return {id, s[2], 'vanished', created}
end

local found = {}
for i = 4 + 2 * lanes, #ARGV do
  local k = 4 * (i - 3 - 2 * lanes)
  local done, reply = pcall(look, ARGV[i], KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3])
  if not done then
    redis.call('ZADD', KEYS[1], now + patience, ARGV[i]) -- broken keys must not be looked at in every sweep
  elseif reply then
    found[#found + 1] = reply
  end
end
table.sort(found, function(a, b) return a[4] > b[4] end)
for _, each in ipairs(found) do
  each[4] = nil
end
return found
