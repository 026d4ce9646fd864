-- sweep: of the jobs that are due, find those nobody works on; they are to be delivered again by the caller.
--
-- KEYS  1 open  2 ended  3 repack  then per job: state, log, spec, the line it waits in (any name where it is in none)
-- ARGV  1 lease (ms)  2 patience (ms)  3 number of lanes, then per lane: its name and when the oldest delivery that
--       waits in it was submitted (ms, or '' for an empty lane)  then per job: its id
-- Returns {id, lane, 'lost' | 'vanished' | 'due'} per job to deliver; each is rescored as it is taken, so that several
-- sweeps at once take different jobs, and a delivery that is lost again is found again.
-- A queued job counts as vanished only when its lane holds nothing older than it: a backlog is no loss. Nor has one
-- vanished that stands in the line of a limit: a worker takes it from there.
-- flags: allow-oom
-- uses: _ending

local now = server_ms()
local lease, patience, lanes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local oldest = {}
for i = 1, lanes do
  oldest[ARGV[2 + 2 * i]] = tonumber(ARGV[3 + 2 * i])
end

local function look(id, state, log, spec, line)
  local score = redis.call('ZSCORE', KEYS[1], id)
  if not score or tonumber(score) > now then
    return nil -- another sweep took it
  end
  local s = redis.call('HMGET', state, 'status', 'lane', 'lease', 'not_before', 'expires', 'attempt', 'seq', 'created',
    'place')
  if not s[1] or CLOSED[s[1]] then
    redis.call('ZREM', KEYS[1], id)
    return nil
  end
  if s[1] == 'in_progress' then
    local left = tonumber(s[3] or 0) - now
    redis.call('ZADD', KEYS[1], now + (left > 0 and left or lease), id)
    return left <= 0 and {id, s[2], 'lost'} or nil
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
    return {id, s[2], 'due'}
  end
  redis.call('ZADD', KEYS[1], now + patience, id)
  if s[9] and redis.call('ZSCORE', line, s[9]) then
    return nil
  end
  local waiting = oldest[s[2]]
  if waiting and waiting <= tonumber(s[8]) then
    return nil
  end
  return {id, s[2], 'vanished'}
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
return found
